"""Pairs that train a reward model and pairs that measure it; and one real ensemble, fitted, served, adopted."""

import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pytest
import torch
from safetensors.torch import load_file

from rayrl.config import RunConfig
from rayrl.data.blocks import BlockTable
from rayrl.errors import DataError
from rayrl.fleets.services import Services
from rayrl.models.policy import load_policy
from rayrl.models.reward_model import RewardModel
from rayrl.records import Checkpoint, PreferencePair, Response, Sampled, Scored, to_table
from rayrl.runs.run import Run
from rayrl.runs.stage_table import FIT_REWARD_MODEL, REFIT_REWARD_MODEL
from rayrl.stages.artifacts import Preferences, Responses
from rayrl.stages.reward_model.fit_reward_model import fit_reward_model, member_seed
from rayrl.stages.reward_model.training_data import TrainingRows, held_out_pairs, held_out_prompts, sampled_sequences
from rayrl.stages.rewards.reward_models import pair_items, validate_pairs
from rayrl.training.reward_model import sequence_batch
from tests.fakes import FinishedRun, made_up

GOOD, BAD = 40, 41


def pair(prompt, n=0, source="data"):
    """A pair whose better response holds one token, and whose worse one another."""
    rng = np.random.default_rng([sum(prompt.encode()), n])
    texts = [rng.integers(50, 700, 8).tolist() for _ in range(2)]
    return PreferencePair(
        prompt_id=prompt,
        prompt="?",
        prompt_token_ids=[1, 60, 61],
        chosen_id=f"{prompt}-{2 * n}",
        rejected_id=f"{prompt}-{2 * n + 1}",
        chosen="good",
        rejected="bad",
        chosen_token_ids=[*texts[0][: n + 4], GOOD, *texts[0][n + 4 :]],
        rejected_token_ids=[*texts[1][: n + 3], BAD, *texts[1][n + 3 :]],
        chosen_score=1.0,
        rejected_score=0.0,
        chosen_reference_logprob=0.0,
        rejected_reference_logprob=0.0,
        source=source,
    )


def blocks_of(folder, pairs, size=8):
    blocks = [pairs[start : start + size] for start in range(0, len(pairs), size)]
    table = BlockTable(str(folder), len(blocks))
    for number, block in enumerate(blocks):
        table.write(number, to_table(block, PreferencePair))
    return table


PAIRS = [pair(f"p{n}", i) for n in range(10) for i in range(n % 2 + 1)]


def test_the_held_out_prompts_follow_the_seed_and_not_the_order(tmp_path):
    held_out = held_out_prompts(blocks_of(tmp_path / "a", PAIRS), 0.3, seed=0)
    assert len(held_out) == 3
    assert held_out == held_out_prompts(blocks_of(tmp_path / "b", PAIRS[::-1], size=3), 0.3, seed=0)
    assert held_out != held_out_prompts(blocks_of(tmp_path / "a", PAIRS), 0.3, seed=1)
    pairs = list(held_out_pairs(BlockTable(str(tmp_path / "a"), 2), held_out))
    assert pairs == [p for p in PAIRS if p.prompt_id in held_out]


@pytest.mark.parametrize("holdout", [0.001, 0.999])
def test_no_side_of_the_split_is_empty(tmp_path, holdout):
    assert len(held_out_prompts(blocks_of(tmp_path, [pair("a"), pair("b")]), holdout, seed=0)) == 1


def test_pairs_of_one_prompt_are_refused(tmp_path):
    with pytest.raises(DataError, match=r"pairs of at least 2 prompts, .*got 1"):
        held_out_prompts(blocks_of(tmp_path, [pair("a", 0), pair("a", 1)]), 0.5, seed=0)


def training_rows(tmp_path, **changes):
    sources = (blocks_of(tmp_path / "d", PAIRS), blocks_of(tmp_path / "synthetic", [pair("p3", 5), pair("u1", 6)]))
    rows = TrainingRows(sources=sources, weights=None, held_out=frozenset({"p3"}), max_tokens=100)
    return replace(rows, **changes)


def rows_of(training):
    num_blocks = sum(source.num_blocks for source in training.sources)
    return [row for number in range(num_blocks) for row in training.block(number).to_pylist()]


def test_everything_but_held_out_prompts_trains(tmp_path):
    rows = rows_of(training_rows(tmp_path))
    names = [(row["chosen_id"], row["rejected_id"]) for row in rows]
    assert names == [(p.chosen_id, p.rejected_id) for p in PAIRS if p.prompt_id != "p3"] + [("u1-12", "u1-13")]
    assert rows[0]["chosen_token_ids"] == PAIRS[0].prompt_token_ids + PAIRS[0].chosen_token_ids
    assert {row["weight"] for row in rows} == {1.0}


def test_sequences_are_cut_and_pairs_without_a_difference_left_out(tmp_path):
    rows = rows_of(training_rows(tmp_path, max_tokens=5))
    assert all(len(row["chosen_token_ids"]) == 5 for row in rows)
    assert rows_of(training_rows(tmp_path, max_tokens=3)) == []


def test_weights_are_those_of_their_pairs_and_of_d_only(tmp_path):
    table = BlockTable(str(tmp_path / "weights"), 2)
    for number in range(2):
        pairs = PAIRS[8 * number : 8 * number + 8][::-1]
        names = [{"chosen_id": p.chosen_id, "rejected_id": p.rejected_id} for p in pairs]
        weighed = [name | {"weight": float(len(name["chosen_id"]) + number)} for name in names]
        table.write(number, pa.Table.from_pylist(weighed))
    rows = rows_of(training_rows(tmp_path, weights=table))
    kept = [n for n, p in enumerate(PAIRS) if p.prompt_id != "p3"]
    assert [row["weight"] for row in rows] == [len(PAIRS[n].chosen_id) + n // 8 for n in kept] + [1.0]
    table.write(0, table.read(0).slice(0, 1))
    with pytest.raises(KeyError):
        rows_of(training_rows(tmp_path, weights=table))


def test_sampled_sequences_come_from_every_part_of_a_small_table(tmp_path):
    table = BlockTable(str(tmp_path), 3)
    for number in range(3):
        rows = [{"chosen_token_ids": [number, i], "rejected_token_ids": [number, -i]} for i in range(10)]
        table.write(number, pa.Table.from_pylist(rows))
    sequences = sampled_sequences(table, 6, seed=0)
    assert len(sequences) == 12
    assert {tokens[0] for tokens in sequences} == {0, 1, 2}
    assert len(sampled_sequences(table, 1000, seed=0)) == 60


def test_members_have_seeds_of_their_own():
    seeds = [member_seed(seed, member) for seed in range(3) for member in range(3)]
    assert len(set(seeds)) == 9


def open_run(folder, policy, max_model_len=None, **reward_model):
    config = RunConfig.model_validate(
        {
            "name": "reward",
            "run_dir": str(folder),
            "pipeline": "rlp",
            "policy": {"path": policy.path, "dtype": "float32", "max_model_len": max_model_len},
            "pool": {"path": "prompts.jsonl"},
            "sft": {"enabled": False},
            "oracle": {"type": "scripted", "function": "a:b"},
            "preferences": {"data": {"path": "pairs.jsonl"}},
            "reward_model": {"learning_rate": 1e-3, "epochs": 4, "holdout": 0.25, "batch_size": 8} | reward_model,
            "refresh": {"uml": {"batch_size": 4, "hidden_dim": 32, "z_dim": 8}},
        }
    )
    return Run(config=config, url=str(folder))


def preferences(folder, pairs, key):
    return Preferences(key=key, table=blocks_of(folder, pairs), num_pairs=len(pairs))


def responses(folder, num_prompts):
    def response(n, i):
        return Response(
            id=f"u{n}-{i}",
            text=f"{n} {i}",
            token_ids=[70 + n, 80 + i, 2],
            seed=0,
            policy_version="pi",
            logprob=-1.0,
            finish_reason="stop",
        )

    rows = [
        Sampled(prompt_id=f"u{n}", prompt="?", prompt_token_ids=[1, 60 + n], responses=[response(n, 0), response(n, 1)])
        for n in range(num_prompts)
    ]
    table = BlockTable(str(folder), 1)
    table.write(0, to_table(rows, Sampled))
    return Responses(key="y", table=table, num_prompts=num_prompts, num_responses=2 * num_prompts)


def trainers_values(checkpoint, sequences):
    model = RewardModel(load_policy(checkpoint, torch.float32), "last").eval()
    model.head.load_state_dict(load_file(f"{checkpoint.path}/head/head.safetensors"))
    batch = sequence_batch(sequences)
    with torch.no_grad():
        return model(batch).tolist()


@pytest.fixture(scope="module")
def refreshed(ray_cluster, tiny_policy, tmp_path_factory):
    """An ensemble of two on D, synthetic pairs and views: (run, services, D, reward models)."""
    folder = tmp_path_factory.mktemp("refreshed")
    run = open_run(folder / "run", tiny_policy, num_members=2, objective="worst_case")
    d = preferences(folder / "d", [pair(f"p{n}", n % 3) for n in range(64)], "d")
    synthetic = preferences(folder / "synthetic", [pair(f"u{n}", 4, "reward_model") for n in range(6)], "d^")
    services = Services(run, mode="overlap", reference="generation")

    def fitted():
        views = responses(folder / "y", 6)
        return fit_reward_model(
            run, services, tiny_policy.checkpoint, [d, synthetic], stage=REFIT_REWARD_MODEL, views=views
        )

    yield SimpleNamespace(run=run, services=services, d=d, models=fitted(), again=fitted)
    services.stop()


@pytest.mark.slow
def test_an_ensemble_is_fitted_and_measured_on_held_out_pairs_of_d(refreshed):
    done = refreshed.run.manifest(REFIT_REWARD_MODEL)
    assert done.num_rows == 48 + 6
    assert done.metrics.num_left_out == 16
    assert done.metrics.validation.num == 16
    assert done.metrics.validation.accuracy.mean > 0.5 + 2 * 0.5 / math.sqrt(16)
    members = done.metrics.members
    assert len(members) == 2
    for number, member in enumerate(members):
        assert member.fit.final_loss < member.fit.first_loss
        assert member.fit == refreshed.run.manifest(REFIT_REWARD_MODEL.member(number)).metrics
        assert 0 <= member.validation.calibration_error <= 0.5
    assert members[0].validation.mean_margin != members[1].validation.mean_margin
    assert list(refreshed.models.stds) == done.metrics.stds
    assert all(std > 0 for std in refreshed.models.stds)


@pytest.mark.slow
def test_a_second_call_finds_the_work_done(refreshed):
    before = refreshed.run.manifest(REFIT_REWARD_MODEL)
    assert refreshed.again() == refreshed.models
    assert refreshed.run.manifest(REFIT_REWARD_MODEL) == before


@pytest.mark.slow
def test_served_rewards_are_the_trainers(refreshed):
    items = [Scored(prompt="?", response="!", token_ids=[1, 60, 90 + n, GOOD, 91]) for n in range(5)]
    sequences = [item.token_ids for item in items]
    scorer = refreshed.models.serve(refreshed.services)
    expected = np.array([trainers_values(member, sequences) for member in refreshed.models.checkpoints])
    np.testing.assert_allclose(scorer.values(items), expected, atol=1e-4)
    single = replace(scorer, members=scorer.members[:1])
    assert refreshed.models.value_start == scorer.members[0]
    np.testing.assert_allclose(single.score(items), expected[0], atol=1e-4)
    means, stds = (np.array(v)[:, None] for v in (refreshed.models.means, refreshed.models.stds))
    np.testing.assert_allclose(scorer.score(items), ((expected - means) / stds).min(0), atol=1e-3)
    pairs = [pair(f"new{n}") for n in range(30)]
    assert validate_pairs(pairs, single.score(pair_items(pairs))).accuracy.mean > 0.6


@pytest.mark.slow
def test_a_ready_made_model_is_measured_alike(refreshed, tiny_policy, tmp_path):
    path = refreshed.models.checkpoints[1].path
    run = open_run(tmp_path / "run", tiny_policy, path=path)
    adopted = fit_reward_model(run, refreshed.services, tiny_policy.checkpoint, [refreshed.d])
    assert [checkpoint.path for checkpoint in adopted.checkpoints] == [path]
    fitted = refreshed.run.manifest(REFIT_REWARD_MODEL).metrics.members[1].validation
    measured = run.manifest(FIT_REWARD_MODEL).metrics
    assert measured.members[0].fit is None
    assert measured.validation.mean_margin == pytest.approx(fitted.mean_margin, abs=1e-4)
    assert measured.validation.accuracy.num == fitted.accuracy.num
    for name in ("mean", "standard_error"):
        expected = getattr(fitted.accuracy, name)
        assert getattr(measured.validation.accuracy, name) == pytest.approx(expected, abs=1e-4)
    assert fit_reward_model(run, refreshed.services, tiny_policy.checkpoint, [refreshed.d]) == adopted


class Began(Exception):
    """The fit of a member would begin now."""


@pytest.mark.parametrize("is_same_work", [False, True])
def test_an_ensemble_with_missing_members_is_not_done(tmp_path, monkeypatch, is_same_work):
    def begin(*arguments):
        raise Began

    monkeypatch.setattr("rayrl.stages.reward_model.fit_reward_model.training_data", begin)
    run = open_run(tmp_path, Checkpoint(path="model", version="m1"), num_members=2)
    d = Preferences(key="d", table=BlockTable(str(tmp_path), 1), num_pairs=1)
    keys = FinishedRun(config=run.config, url=run.url)
    services = SimpleNamespace(dtype="float32")
    m1 = Checkpoint(path="model", version="m1")
    fit_reward_model(keys, services, m1, [d])
    key = keys.keys[FIT_REWARD_MODEL.name] if is_same_work else "other"
    metrics = made_up(FIT_REWARD_MODEL.metrics)
    run.finish(FIT_REWARD_MODEL, key, since=0.0, num_rows=1, metrics=metrics, summary="done")
    with pytest.raises(Began):
        fit_reward_model(run, services, m1, [d])
    # What other work has left is gone before the fits.
    assert (run.manifest(FIT_REWARD_MODEL) is not None) == is_same_work


def test_too_few_views_are_refused_before_the_fit(ray_cluster, tiny_policy, tmp_path):
    run = open_run(tmp_path / "run", tiny_policy)
    d = preferences(tmp_path / "d", [pair(f"p{n}") for n in range(6)], "d")
    services = Services(run, mode="overlap", reference="generation")
    with pytest.raises(DataError, match=r"at least 2 prompts with two different responses.* got 1"):
        fit_reward_model(run, services, tiny_policy.checkpoint, [d], views=responses(tmp_path / "y", 1))


def test_prompts_that_fill_the_context_are_refused(ray_cluster, tiny_policy, tmp_path):
    run = open_run(tmp_path / "run", tiny_policy, max_model_len=3)
    d = preferences(tmp_path / "d", [pair(f"p{n}") for n in range(6)], "d")
    services = Services(run, mode="overlap", reference="generation")
    with pytest.raises(DataError, match="no pair to train on: the prompts fill the context of 3 tokens"):
        fit_reward_model(run, services, tiny_policy.checkpoint, [d])
