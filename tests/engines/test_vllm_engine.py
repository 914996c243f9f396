"""Replicas against transformers: the same numbers before and after a swap, and a refusal when they are not."""

import json
import os
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import ray
import torch
from safetensors.torch import load_file, save_file

from rayrl.data.collate import collate
from rayrl.engines.generator import Sampling
from rayrl.errors import WeightSyncError
from rayrl.models.policy import response_logprobs
from rayrl.models.reward_model import pool
from rayrl.records import Checkpoint
from rayrl.training.sync.export import PROBE_CANDIDATES, probe_prompt

PROMPT = list(range(5, 25))


def continuation_of(model, prompt, continuation):
    with torch.no_grad():
        return response_logprobs(model, collate([prompt], [continuation])).item()


def long_prompt_logprob(model, prompt):
    """log p of the last 100 tokens of a 300-token prompt."""
    return continuation_of(model, prompt[:-100], prompt[-100:])


@pytest.fixture(scope="module")
def other(tmp_path_factory, tiny_policy):
    """The tiny policy with other weights, exported as training exports: with a probe."""
    folder = tmp_path_factory.mktemp("other") / "model"
    model = tiny_policy.load()
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(Path(tiny_policy.path) / name, folder)
    prompt = probe_prompt(model.config)
    with torch.no_grad():
        out = model(torch.tensor([prompt]), output_hidden_states=True)
    top = out.logits[0, -1].log_softmax(-1).topk(PROBE_CANDIDATES)
    probe = {"prompt_token_ids": prompt, "token_ids": top.indices.tolist(), "logprobs": top.values.tolist()}
    probe["embedding"] = {"mean": out.hidden_states[-1][0].mean(0)[:8].tolist()}
    (folder / "probe.json").write_text(json.dumps(probe))
    return Checkpoint(path=str(folder), version="other"), model


def test_generation_logprob_is_the_trainers(generators, tiny_policy):
    sampling = Sampling(temperature=0.8, top_p=0.9, max_tokens=24)
    (sampled,) = generators.call("generate", tiny_policy.checkpoint, [PROMPT], [[1, 2, 3]], sampling)
    model = tiny_policy.load()
    for continuation in sampled:
        assert continuation.logprob == pytest.approx(continuation_of(model, PROMPT, continuation.token_ids), abs=1e-3)


def test_a_row_is_generated_again_alone(generators, tiny_policy):
    sampling = Sampling(temperature=1.0, max_tokens=24)
    prompts = [PROMPT[:n] for n in range(4, 20)]
    together = generators.call("generate", tiny_policy.checkpoint, prompts, [[n, n + 100] for n in range(16)], sampling)
    ((alone,),) = generators.call("generate", tiny_policy.checkpoint, [prompts[7]], [[107]], sampling)
    assert alone.token_ids == together[7][1].token_ids
    assert alone.token_ids != together[7][0].token_ids


def test_logprobs_of_a_sequence_that_fills_the_context(generators, tiny_policy):
    model = tiny_policy.load()
    context = model.config.max_position_embeddings
    tokens = [3 + (7 * i) % 700 for i in range(context)]
    cuts = (context - 1, 100)  # a continuation of one token, and a long one
    read = generators.call("logprobs", tiny_policy.checkpoint, [tokens[:c] for c in cuts], [tokens[c:] for c in cuts])
    expected = [continuation_of(model, tokens[:c], tokens[c:]) for c in cuts]
    assert read == pytest.approx(expected, rel=1e-5)
    assert generators.call("logprobs", tiny_policy.checkpoint, [PROMPT], [[]]) == [0.0]


def test_swap_serves_the_new_weights_on_a_long_cached_prompt(generators, tiny_policy, other):
    checkpoint, model = other
    old = tiny_policy.load()
    prompt = probe_prompt(model.config)
    before = generators.call("logprobs", tiny_policy.checkpoint, [prompt[:-100]], [prompt[-100:]])[0]
    after = generators.call("logprobs", checkpoint, [prompt[:-100]], [prompt[-100:]])[0]
    back = generators.call("logprobs", tiny_policy.checkpoint, [prompt[:-100]], [prompt[-100:]])[0]
    assert before == pytest.approx(long_prompt_logprob(old, prompt), abs=1e-3)
    assert after == pytest.approx(long_prompt_logprob(model, prompt), abs=1e-3)
    assert back == before
    assert abs(after - before) > 1


def test_a_swap_that_keeps_the_prefix_cache_is_caught(generators, tiny_policy, other):
    checkpoint, _ = other
    probe = json.loads((Path(checkpoint.path) / "probe.json").read_text())
    generators.call("next_token_logprobs", tiny_policy.checkpoint, [probe["prompt_token_ids"]], probe["token_ids"])
    with pytest.raises(WeightSyncError, match="away from the trainer"):
        ray.get(generators.replicas[0].swap.remote(checkpoint, reset_cache=False))
    # the replica has stopped itself; Ray brings a clean one, which serves what it is asked for
    sampling = Sampling(temperature=0.0, max_tokens=4)
    assert generators.call("generate", tiny_policy.checkpoint, [PROMPT], [[0]], sampling)


def test_half_a_state_dict_is_caught(generators, tiny_policy, other, tmp_path):
    checkpoint, _ = other
    folder = tmp_path / "half"
    shutil.copytree(checkpoint.path, folder)
    weights = load_file(folder / "model.safetensors")
    save_file({k: v for k, v in weights.items() if "layers.0" not in k}, folder / "model.safetensors")
    generators.call("logprobs", tiny_policy.checkpoint, [PROMPT], [PROMPT])
    with pytest.raises(WeightSyncError):
        generators.call("logprobs", Checkpoint(path=str(folder), version="half"), [PROMPT], [PROMPT])
    assert generators.call("logprobs", checkpoint, [PROMPT], [PROMPT])


def test_a_killed_replica_answers_the_same_call(generators, tiny_policy):
    sampling = Sampling(temperature=1.0, max_tokens=200)
    seeds = [[i, i + 1000] for i in range(64)]
    undisturbed = generators.call("generate", tiny_policy.checkpoint, [PROMPT] * 64, seeds, sampling)
    pid = ray.get(generators.replicas[0].status.remote())["pid"]
    call = generators.replicas[0].generate.remote(tiny_policy.checkpoint, [PROMPT] * 64, seeds, sampling)
    os.kill(pid, signal.SIGKILL)
    again = ray.get(call, timeout=300)
    assert [[c.token_ids for c in row] for row in again] == [[c.token_ids for c in row] for row in undisturbed]


def test_a_replica_that_cannot_load_dies_and_the_next_one_answers(generators, tiny_policy, tmp_path):
    before = ray.get(generators.replicas[0].status.remote())["pid"]
    broken = tmp_path / "broken"
    shutil.copytree(tiny_policy.path, broken)
    (broken / "model.safetensors").write_bytes(b"half a file")
    with pytest.raises(ray.exceptions.RayActorError):
        ray.get(
            generators.replicas[0]
            .adopt.options(max_task_retries=0)
            .remote(Checkpoint(path=str(broken), version="b"), False)
        )
    assert generators.call("logprobs", tiny_policy.checkpoint, [PROMPT], [[7, 8]])[0] < 0
    assert ray.get(generators.replicas[0].status.remote())["pid"] != before


def test_what_is_being_written_goes_on_under_the_new_weights(generators, tiny_policy, other):
    checkpoint, new = other
    sampling = Sampling(temperature=1.0, max_tokens=100)
    prompts, seeds = [[*PROMPT, i] for i in range(200)], [[i, i + 1000] for i in range(200)]
    generators.adopt(tiny_policy.checkpoint)
    call = generators.replicas[0].generate.remote(tiny_policy.checkpoint, prompts, seeds, sampling)
    time.sleep(1.0)
    generators.adopt(checkpoint, in_flight=True)
    assert ray.wait([call], timeout=0)[1], "the swap waited for the requests"
    sampled = [(p, c) for p, row in zip(prompts, ray.get(call), strict=True) for c in row]
    versions = {tuple(c.versions) for _, c in sampled}
    assert ("tiny", "other") in versions and versions <= {("tiny",), ("other",), ("tiny", "other")}
    old, moved = tiny_policy.load(), 0
    for prompt, said in [(p, c) for p, c in sampled if len(c.versions) > 1 and len(c.token_ids) > 4][:64]:
        first, last = said.token_ids[:1], said.token_ids[-1:]
        begun = abs(continuation_of(old, prompt, first) - said.token_logprobs[0]) < 1e-3
        ended = abs(continuation_of(new, prompt + said.token_ids[:-1], last) - said.token_logprobs[-1]) < 1e-3
        moved += begun and ended
    assert moved > 5, "begun by the old weights, and ended by the new ones, which read all of it again"


def test_embeddings_are_the_pooled_hidden_states(embedders, tiny_policy):
    inputs = [PROMPT[:n] for n in (3, 9, 20)]
    vectors = embedders.call("embed", tiny_policy.checkpoint, inputs)
    model = tiny_policy.load()
    for tokens, vector in zip(inputs, vectors, strict=True):
        with torch.no_grad():
            hidden = model(torch.tensor([tokens]), output_hidden_states=True).hidden_states[-1]
        expected = pool(hidden, torch.ones(1, len(tokens), dtype=torch.long), "mean")[0].numpy()
        np.testing.assert_allclose(vector, expected, atol=1e-4)


def test_embedders_take_a_policys_weights_and_prove_them(embedders, other, tmp_path):
    checkpoint, model = other
    inputs = [list(range(3, 40)), list(range(50, 55))]
    vectors = embedders.call("embed", checkpoint, inputs)
    with torch.no_grad():
        for tokens, vector in zip(inputs, vectors, strict=True):
            hidden = model(torch.tensor([tokens]), output_hidden_states=True).hidden_states[-1]
            expected = pool(hidden, torch.ones(1, len(tokens)), "mean")[0].numpy()
            assert np.abs(vector - expected).max() < 1e-4
    false = tmp_path / "false"
    shutil.copytree(checkpoint.path, false)
    probe = json.loads((false / "probe.json").read_text())
    probe["embedding"]["mean"][0] += 0.1
    (false / "probe.json").write_text(json.dumps(probe))
    with pytest.raises(WeightSyncError, match="the replica is stopped"):
        embedders.call("embed", Checkpoint(path=str(false), version="false"), inputs)
