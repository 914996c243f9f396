"""The simulated engines: they offer what the real ones do, take the time they are told to, and repeat themselves."""

import asyncio
import inspect
import time

import numpy as np
import pytest

from rayrl.config import EngineConfig
from rayrl.engines.embedder import Embedder
from rayrl.engines.generator import Generator, Sampling
from rayrl.engines.simulated import DIMENSION, SimulatedEmbedder, SimulatedGenerator
from rayrl.engines.vllm_engine import EngineSpec
from rayrl.records import Checkpoint

M1, M2 = (Checkpoint(path="none", version=version) for version in ("m1", "m2"))
PROMPTS = [[1, 2, 3], [4, 5]]
SAMPLING = Sampling(temperature=1.0, max_tokens=16)


def started(replica, request_s=0.0, slots=32):
    config = EngineConfig(max_num_seqs=slots, engine_args={"request_s": request_s, "swap_s": 0.0})
    return replica(
        EngineSpec(
            checkpoint=M1, config=config, dtype="float32", max_model_len=None, trust_remote_code=False, on_gpu=False
        )
    )


def generate(generator, prompts, seeds, sampling=SAMPLING, checkpoint=M1):
    return asyncio.run(generator.generate(checkpoint, prompts, seeds, sampling))


def public(replica):
    return {name: method for name, method in inspect.getmembers(replica, inspect.isfunction) if name[0] != "_"}


def parameters(method):
    """Without what Ray adds to a class that it has made actors of."""
    return [p for p in inspect.signature(method).parameters.values() if not p.name.startswith("_ray")]


@pytest.mark.parametrize(("simulated", "real"), [(SimulatedGenerator, Generator), (SimulatedEmbedder, Embedder)])
def test_they_offer_what_the_real_ones_offer(simulated, real):
    ours, theirs = public(simulated), public(real)
    assert ours.keys() == theirs.keys()
    for name, method in theirs.items():
        assert parameters(ours[name]) == parameters(method), name
        assert inspect.iscoroutinefunction(ours[name]) == inspect.iscoroutinefunction(method), name


def test_an_answer_is_a_function_of_seed_and_prompt():
    together = generate(started(SimulatedGenerator), PROMPTS, [[7, 8], [7]])
    ((alone,),) = generate(started(SimulatedGenerator), PROMPTS[1:], [[7]])
    assert together[1] == [alone]
    assert len({answer.text for of_prompt in together for answer in of_prompt}) == 3
    assert generate(started(SimulatedGenerator), PROMPTS[1:], [[7]], checkpoint=M2)[0][0].text != alone.text


def test_an_answer_is_cut_at_max_tokens():
    ((whole,),) = generate(started(SimulatedGenerator), PROMPTS[:1], [[7]])
    ((cut,),) = generate(started(SimulatedGenerator), PROMPTS[:1], [[7]], Sampling(temperature=1.0, max_tokens=5))
    assert (whole.finish_reason, cut.finish_reason) == ("stop", "length")
    assert cut.token_ids == whole.token_ids[:5] and whole.text.startswith(cut.text)


def test_log_probabilities_agree_with_those_of_the_sampling():
    generator = started(SimulatedGenerator)
    answers = [of_prompt[0] for of_prompt in generate(generator, PROMPTS, [[7], [8]])]
    read = asyncio.run(generator.logprobs(M1, PROMPTS, [answer.token_ids for answer in answers]))
    assert read == [answer.logprob for answer in answers] == [sum(answer.token_logprobs) for answer in answers]
    shares = np.exp(asyncio.run(generator.next_token_logprobs(M1, PROMPTS, [3, 4, 5])))
    assert shares.shape == (2, 3)
    np.testing.assert_allclose(shares.sum(1), 1.0)


def test_a_vector_depends_on_its_own_tokens_only():
    embedder = started(SimulatedEmbedder)
    inputs = [[i, i + 1, 5000 + i] for i in range(300)]
    vectors = asyncio.run(embedder.embed(M1, inputs))
    assert (vectors.shape, vectors.dtype) == ((300, DIMENSION), np.float32)
    np.testing.assert_array_equal(asyncio.run(embedder.embed(M1, inputs[200:203])), vectors[200:203])
    values = asyncio.run(embedder.values(M1, inputs))
    assert values.shape == (300,) and values.dtype == np.float64 and len(set(values.tolist())) == 300
    assert not np.array_equal(asyncio.run(embedder.values(M2, inputs)), values)


def test_requests_beyond_the_slots_wait_for_those_before():
    async def both():
        generator = started(SimulatedGenerator, request_s=0.1, slots=4)
        began = time.monotonic()

        async def call():
            await generator.generate(M1, [[1], [2]], [[0, 1], [0, 1]], SAMPLING)
            return time.monotonic() - began

        return await asyncio.gather(call(), call(), call())

    first, second, third = asyncio.run(both())
    assert 0.1 <= first < second < third
    assert second >= 0.2 and third >= 0.3


def test_a_swap_waits_for_what_is_running():
    async def during():
        generator = started(SimulatedGenerator, request_s=0.05)
        old = asyncio.create_task(generator.generate(M1, PROMPTS, [[7], [7]], SAMPLING))
        await asyncio.sleep(0)
        new = await generator.generate(M2, PROMPTS, [[7], [7]], SAMPLING)
        return old.done(), (await old)[0][0].versions, new[0][0].versions, (await generator.status())["version"]

    assert asyncio.run(during()) == (True, ["m1"], ["m2"], "m2")
