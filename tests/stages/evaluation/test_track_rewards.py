"""Reward models along PPO, and synthetic pairs, measured against the oracle."""

from types import SimpleNamespace

import numpy as np
import pytest

from rayrl.config import RunConfig
from rayrl.data.blocks import BlockTable
from rayrl.metrics.curves import MetricLog
from rayrl.records import HeldOutAnswer, Response, Sampled, to_table
from rayrl.runs import storage
from rayrl.runs.run import Run
from rayrl.runs.stage_metrics import SynthesizeMetrics
from rayrl.runs.stage_table import PPO, PPO_REFRESHED, SAMPLES, SYNTHESIZE
from rayrl.stages.evaluation.audit_pairs import drawn_pairs, measure_agreement, possible_pairs
from rayrl.stages.evaluation.track_rewards import Point, find_points, measure_point, read_answers
from rayrl.stages.policy.ppo import HELD_OUT
from rayrl.stages.synthesis.outcomes import Outcome
from rayrl.training import served_policy


def open_run(folder):
    config = {
        "name": "tracked",
        "run_dir": str(folder),
        "pipeline": "rlp",
        "policy": {"path": "model"},
        "pool": {"path": "prompts.jsonl"},
        "sft": {"enabled": False},
        "oracle": {"type": "scripted", "function": "a:b"},
        "preferences": {"data": {"path": "pairs.jsonl"}},
        "ppo": {"num_workers": 2},
    }
    return Run(config=RunConfig.model_validate(config), url=str(folder))


def write_step(run, ppo, step, num_prompts, num_ranks=2):
    table = BlockTable(run.folder(ppo, "held_out", str(step)), num_ranks)
    for rank in range(num_ranks):
        answers = [
            HeldOutAnswer(
                prompt_id=f"p{i}",
                prompt="Tell.",
                prompt_token_ids=[1],
                response=f"{ppo.name} {step} {i} {n}",
                token_ids=[2],
                reward=0.0,
            )
            for n in range(2)
            for i in range(rank, num_prompts, num_ranks)
        ]
        table.write(rank, to_table(answers, HeldOutAnswer))


def test_points_are_m1_and_steps_of_each_ppo_up_to_the_last(tmp_path):
    run = open_run(tmp_path)
    for ppo in (PPO, PPO_REFRESHED):
        write_step(run, ppo, 0, 7)
        with MetricLog(run.url, ppo.name) as log:
            log.log(0, held_out_reward=0.0)  # M1 has no KL to itself
            for step in range(1, 25):
                if step % 2 == 0:
                    write_step(run, ppo, step, 7)
                log.log(step, kl=step / 2, **({"held_out_reward": 0.1} if step % 2 == 0 else {}))
    points = find_points(run, [PPO, PPO_REFRESHED], budget=100)
    assert [(p.ppo, p.step, p.kl) for p in points] == [
        (PPO, 0, 0.0),
        *[(PPO, s, s / 2) for s in (2, 10, 16, 24)],
        *[(PPO_REFRESHED, s, s / 2) for s in (2, 10, 16, 24)],
    ]
    assert {len(point.answers) for point in points} == {5}  # 100 queries, 9 points, 2 answers
    assert len({tuple(pair[0].prompt_id for pair in point.answers) for point in points}) == 1, "the same prompts"
    assert all(a.response != b.response and a.prompt_id == b.prompt_id for p in points for a, b in p.answers)


@pytest.mark.parametrize("num_ranks", [1, 2, 3])
def test_answers_are_read_whole_whatever_the_number_of_workers_now(tmp_path, num_ranks):
    run = open_run(tmp_path)
    assert run.config.ppo.num_workers == 2
    write_step(run, PPO, 4, 7, num_ranks)
    answers = read_answers(run.folder(PPO, HELD_OUT, "4"))
    assert sorted(pair[0].prompt_id for pair in answers) == [f"p{i}" for i in range(7)]
    assert {len(pair) for pair in answers} == {2}


def test_a_step_that_is_measured_again_keeps_no_part_of_other_ranks(tmp_path, monkeypatch):
    monkeypatch.setattr(served_policy, "new_publisher", lambda *arguments, **options: None)
    monkeypatch.setattr(served_policy, "sample", lambda *arguments, **options: None)
    monkeypatch.setattr(served_policy, "held_out_answers", lambda rollout: [])
    monkeypatch.setattr(served_policy.launch, "rank", lambda: 0)
    monkeypatch.setattr(served_policy.launch, "world_size", lambda: 1)
    run = open_run(tmp_path)
    write_step(run, PPO, 4, 7, num_ranks=3)
    job = SimpleNamespace(
        m1=None,
        fleet=None,
        transport=None,
        sampling=None,
        rewards=None,
        seed=0,
        ppo=run.config.ppo,
        held_out=[],
        held_out_url=run.folder(PPO, "held_out"),
    )
    engine = SimpleNamespace(module=SimpleNamespace(policy=None), device="cpu")
    served_policy.ServedPolicy(job, engine, best_reward=0.0).measure(4, always=True)
    assert storage.children(run.folder(PPO, "held_out", "4")) == ["part-00000.parquet"]


def test_a_reward_is_right_where_it_orders_as_the_oracle():
    by_oracle = np.array([[1.0, 2.0], [3.0, 1.0], [2.0, 2.0], [np.nan, 1.0], [4.0, 0.0]])
    rewards = {"r": np.array([[0.1, 0.2], [0.3, 0.4], [1, 2], [1, 2], [5, 1]]), "nothing": np.full((5, 2), np.nan)}
    tracked = measure_point(Point(ppo=PPO, step=3, kl=0.5, answers=[]), by_oracle, rewards)
    assert (tracked.ppo, tracked.step, tracked.kl) == ("ppo", 3, 0.5)
    assert tracked.oracle_score.mean == pytest.approx(np.nanmean(by_oracle))
    assert tracked.oracle_score.num == 9
    r = tracked.rewards["r"]
    assert (r.accuracy.mean, r.accuracy.num) == (pytest.approx(2 / 3), 3)
    assert r.spearman.num == 9
    nothing = tracked.rewards["nothing"]
    assert nothing.mean is nothing.accuracy is nothing.spearman is None


def test_the_quality_of_pairs_is_read_at_every_gamma():
    scores = np.array([[3.0, 1.0], [1.0, 2.0], [2.0, 2.0], [4.0, 0.0]])
    agreement = measure_agreement(scores, [0.4, 0.5, 0.9, 0.9])
    assert (agreement.overall.mean, agreement.overall.num) == (pytest.approx(2 / 3), 3)
    assert agreement.by_gamma["0.4"].mean == pytest.approx(2 / 3)
    assert agreement.by_gamma["0.5"].mean == 0.5
    assert agreement.by_gamma["0.6"].mean == 1.0
    assert agreement.by_gamma["1.0"] is None
    assert measure_agreement(scores, [None] * 4).by_gamma == {}


@pytest.mark.parametrize("clustering", ["strict", None])
def test_refused_pairs_are_possible_pairs_too(tmp_path, clustering):
    run = open_run(tmp_path)
    metrics = SynthesizeMetrics(
        method="spg",
        num_blocks=2,
        num_prompts=6,
        num_pairs=2,
        acceptance_rate=1 / 3,
        outcomes={},
        clustering=clustering,
    )
    done = run.finish(SYNTHESIZE, "k", since=0.0, num_rows=2, metrics=metrics, summary="")
    folder = run.folder(SYNTHESIZE, "k")
    outcomes = BlockTable(f"{folder}/outcomes-strict" if clustering else f"{folder}/outcomes", 2)
    samples = BlockTable(run.folder(SAMPLES, "table"), 2)
    for block in range(2):
        samples.write(block, to_table([sampled(f"p{3 * block + i}") for i in range(3)], Sampled))
        outcomes.write(block, to_table([outcome(f"p{3 * block + i}", i) for i in range(3)], Outcome))
    pairs = possible_pairs(run, done)
    assert [(pair.prompt_id, pair.chosen, pair.rejected) for pair in pairs] == [
        (prompt, f"{prompt} 2", f"{prompt} 0") for prompt in ("p1", "p2", "p4", "p5")
    ]
    drawn = drawn_pairs(pairs, 3, seed=0)
    assert drawn[:2] == drawn_pairs(pairs[::-1], 2, seed=0)
    assert len(drawn) == 3 and drawn_pairs(pairs, 9, seed=1) != drawn_pairs(pairs, 9, seed=0)


def sampled(prompt):
    responses = [
        Response(
            id=f"{prompt}-{i}",
            text=f"{prompt} {i}",
            token_ids=[i],
            seed=i,
            policy_version="pi",
            logprob=-1.0,
            finish_reason="stop",
        )
        for i in range(3)
    ]
    return Sampled(prompt_id=prompt, prompt="?", prompt_token_ids=[1], responses=responses)


def outcome(prompt, kind):
    """A prompt without a pair, with a refused one, or with an accepted one."""
    reason = ("one_cluster", "low_confidence", "accepted")[kind]
    chosen, rejected = (None, None) if kind == 0 else (2, 0)
    return Outcome(
        prompt_id=prompt, reason=reason, chosen=chosen, rejected=rejected, confidence=0.5, cluster_sizes=[2, 1]
    )
