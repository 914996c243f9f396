"""Replicas against transformers: the same numbers before and after a swap, and a refusal of other weights."""

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

from rayrl.config import EngineConfig, PolicyConfig
from rayrl.data.collate import collate
from rayrl.data.tokenizing import load_tokenizer
from rayrl.engines.generator import Generator, Sampling
from rayrl.engines.start import EngineSpec
from rayrl.engines.weight_folder import RECORD_FILE
from rayrl.engines.weight_sums import grouped, named_sums
from rayrl.errors import WeightSyncError
from rayrl.fleets.fleet import start_fleet
from rayrl.models.policy import load_policy, response_logprobs
from rayrl.models.reward_model import pool
from rayrl.records import Checkpoint
from rayrl.training.sync.export import read_policy_text
from tests.training.sync.test_export import WHOLE

PROMPT = list(range(5, 25))
LONG_PROMPT = [3 + (7 * i) % 700 for i in range(300)]
"""Longer than a block of the key-value cache, so that it is cached."""


def continuation_of(model, prompt, continuation):
    with torch.no_grad():
        return response_logprobs(model, collate([prompt], [continuation])).item()


def long_prompt_logprob(model, prompt):
    """log p of the last 100 tokens of a 300-token prompt."""
    return continuation_of(model, prompt[:-100], prompt[-100:])


def write_record(folder, model, text=None):
    """Write the record of a trainer that has this model in memory."""
    sums = grouped(named_sums(dict(model.named_parameters())))
    record = {"dtype": str(model.dtype).removeprefix("torch."), "sums": sums, "text": text}
    (Path(folder) / RECORD_FILE).write_text(json.dumps(record))


def with_noise(policy):
    model = policy.load()
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return model


@pytest.fixture(scope="module")
def other(tmp_path_factory, tiny_policy):
    """The tiny policy with other weights, exported as training exports: with a record."""
    folder = tmp_path_factory.mktemp("other") / "model"
    model = with_noise(tiny_policy)
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(Path(tiny_policy.path) / name, folder)
    tokenizer = load_tokenizer(PolicyConfig(path=tiny_policy.path))
    write_record(folder, model, read_policy_text(WHOLE, model, tokenizer))
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
    prompt = LONG_PROMPT
    before = generators.call("logprobs", tiny_policy.checkpoint, [prompt[:-100]], [prompt[-100:]])[0]
    after = generators.call("logprobs", checkpoint, [prompt[:-100]], [prompt[-100:]])[0]
    back = generators.call("logprobs", tiny_policy.checkpoint, [prompt[:-100]], [prompt[-100:]])[0]
    assert before == pytest.approx(long_prompt_logprob(old, prompt), abs=1e-3)
    assert after == pytest.approx(long_prompt_logprob(model, prompt), abs=1e-3)
    assert back == before
    assert abs(after - before) > 1


def test_a_swap_reports_how_far_the_replica_reads_from_the_trainer(generators, tiny_policy, other):
    checkpoint, _ = other
    text = json.loads((Path(checkpoint.path) / RECORD_FILE).read_text())["text"]
    assert len(text["logprobs"]) == len(text["token_ids"]) - 1 >= 100
    generators.adopt(tiny_policy.checkpoint)
    generators.adopt(checkpoint)
    status = ray.get(generators.replicas[0].status.remote())
    assert 0 < status["text_difference"] < 1e-4


def test_a_text_that_is_read_otherwise_is_reported_and_stops_nothing(generators, tiny_policy, other, tmp_path):
    checkpoint, _ = other
    folder = tmp_path / "misread"
    shutil.copytree(checkpoint.path, folder)
    record = json.loads((folder / RECORD_FILE).read_text())
    record["text"]["logprobs"] = [logprob - 1 for logprob in record["text"]["logprobs"]]
    (folder / RECORD_FILE).write_text(json.dumps(record))
    before = ray.get(generators.replicas[0].status.remote())["pid"]
    generators.adopt(Checkpoint(path=str(folder), version="misread"))
    status = ray.get(generators.replicas[0].status.remote())
    assert status["pid"] == before
    assert status["text_difference"] == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("has_record", [True, False])
def test_half_a_state_dict_is_caught(generators, tiny_policy, other, tmp_path, has_record):
    checkpoint, _ = other
    folder = tmp_path / "half"
    shutil.copytree(checkpoint.path, folder)
    if not has_record:  # a ready-made model
        (folder / RECORD_FILE).unlink()
    weights = load_file(folder / "model.safetensors")
    save_file({k: v for k, v in weights.items() if "layers.0" not in k}, folder / "model.safetensors")
    generators.call("logprobs", tiny_policy.checkpoint, [PROMPT], [PROMPT])
    with pytest.raises(WeightSyncError, match="layer 0 sums to"):
        generators.call("logprobs", Checkpoint(path=str(folder), version="half"), [PROMPT], [PROMPT])
    # The replica has stopped itself; Ray brings a clean one, which serves what it is asked for.
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
        expected = pool(hidden[0], [len(tokens)], "mean")[0].numpy()
        np.testing.assert_allclose(vector, expected, atol=1e-4)


def test_embedders_take_a_policys_weights_and_prove_them(embedders, tiny_policy, other, tmp_path):
    checkpoint, model = other
    inputs = [list(range(3, 40)), list(range(50, 55))]
    vectors = embedders.call("embed", checkpoint, inputs)
    with torch.no_grad():
        for tokens, vector in zip(inputs, vectors, strict=True):
            hidden = model(torch.tensor([tokens]), output_hidden_states=True).hidden_states[-1]
            expected = pool(hidden[0], [len(tokens)], "mean")[0].numpy()
            assert np.abs(vector - expected).max() < 1e-4
    missed = tmp_path / "missed"
    shutil.copytree(checkpoint.path, missed)
    write_record(missed, tiny_policy.load())
    with pytest.raises(WeightSyncError, match=r"is stopped: model\.embed_tokens\.weight sums to|is stopped: layer"):
        embedders.call("embed", Checkpoint(path=str(missed), version="missed"), inputs)


@pytest.fixture(scope="module")
def rounded(ray_cluster, tiny_policy):
    """A fleet of one generation replica in bfloat16."""
    spec = EngineSpec(
        checkpoint=tiny_policy.checkpoint,
        config=EngineConfig(),
        dtype="bfloat16",
        max_model_len=None,
        trust_remote_code=False,
        on_gpu=False,
    )
    fleet = start_fleet("test-rounded", Generator, spec)
    fleet.wait_ready()
    yield fleet
    fleet.stop()


def one_step(model):
    """One AdamW step at 1e-6 on float32 weights that become bfloat16 afterwards, as DeepSpeed takes it."""
    tokens = torch.tensor([LONG_PROMPT])
    model(input_ids=tokens, labels=tokens).loss.backward()
    torch.optim.AdamW(model.parameters(), lr=1e-6, weight_decay=0.0).step()
    return model.bfloat16()


def test_one_step_in_bfloat16_that_does_not_reach_a_replica_is_found(rounded, tiny_policy, tmp_path):
    start = load_policy(tiny_policy.checkpoint, torch.bfloat16)
    stepped = one_step(load_policy(tiny_policy.checkpoint, torch.bfloat16).float())
    changed = [(a != b).float().mean().item() for a, b in zip(start.parameters(), stepped.parameters(), strict=True)]
    assert 0 < max(changed) < 0.05, "few weights move at all"
    for name, model in (("reached", stepped), ("missed", start)):
        model.save_pretrained(tmp_path / name)
        write_record(tmp_path / name, stepped)
    reached = Checkpoint(path=str(tmp_path / "reached"), version="reached")
    replica = ray.get(rounded.replicas[0].status.remote())["pid"]
    for _ in range(10):
        rounded.adopt(reached)
        rounded.adopt(tiny_policy.checkpoint)
    status = ray.get(rounded.replicas[0].status.remote())
    assert (status["pid"], len(status["swaps_s"])) == (replica, 20), "honest swaps raise nothing"
    sums = r"\(-?[\d.]+, [\d.]+\)"
    with pytest.raises(WeightSyncError, match=rf"sums to {sums} in the engine, and in the trainer .* to {sums}"):
        rounded.adopt(Checkpoint(path=str(tmp_path / "missed"), version="missed"))
