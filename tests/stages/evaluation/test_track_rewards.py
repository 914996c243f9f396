"""Reward models along PPO, and synthetic pairs, measured against an expert."""

import numpy as np
import pytest

from rayrl.config import EvaluateConfig
from rayrl.data.blocks import BlockTable
from rayrl.metrics.curves import MetricLog
from rayrl.records import HeldOutAnswer, to_table
from rayrl.stages.evaluation.audit_pairs import audit
from rayrl.stages.evaluation.track_rewards import find_points, measure_point


class OnDisk:
    """As much of a run as reading its PPOs needs."""

    def __init__(self, folder):
        self.url = str(folder)
        self.config = type("Config", (), {"ppo": type("Ppo", (), {"num_workers": 2}), "evaluate": EvaluateConfig()})

    def folder(self, *parts):
        return "/".join((self.url, "stages", *parts))


def write_step(run, ppo, step, num_prompts):
    table = BlockTable(run.folder(ppo, "held_out", str(step)), 2)
    for rank in range(2):
        answers = [
            HeldOutAnswer(
                prompt_id=f"p{i}",
                prompt="Tell.",
                prompt_token_ids=[1],
                response=f"{ppo} {step} {i} {n}",
                token_ids=[2],
                reward=0.0,
            )
            for n in range(2)
            for i in range(rank, num_prompts, 2)
        ]
        table.write(rank, to_table(answers, HeldOutAnswer))


def test_points_are_m1_and_steps_of_each_ppo_up_to_the_last(tmp_path):
    run = OnDisk(tmp_path)
    for ppo in ("ppo", "ppo_refreshed"):
        write_step(run, ppo, 0, 7)
        with MetricLog(run.url, ppo) as log:
            log.log(0, held_out_reward=0.0)  # M1 has no KL to itself
            for step in range(1, 25):
                if step % 2 == 0:
                    write_step(run, ppo, step, 7)
                log.log(step, kl=step / 2, **({"held_out_reward": 0.1} if step % 2 == 0 else {}))
    points = find_points(run, ["ppo", "ppo_refreshed"], budget=100)
    assert [(p.ppo, p.step, p.kl) for p in points] == [
        ("ppo", 0, 0.0),
        *[("ppo", s, s / 2) for s in (2, 10, 16, 24)],
        *[("ppo_refreshed", s, s / 2) for s in (2, 10, 16, 24)],
    ]
    assert {len(point.answers) for point in points} == {5}  # 100 queries, 9 points, 2 answers
    assert len({tuple(pair[0].prompt_id for pair in point.answers) for point in points}) == 1, "the same prompts"
    assert all(a.response != b.response and a.prompt_id == b.prompt_id for p in points for a, b in p.answers)


def test_a_reward_is_right_where_it_orders_as_the_expert():
    expert = np.array([[1.0, 2.0], [3.0, 1.0], [2.0, 2.0], [np.nan, 1.0], [4.0, 0.0]])
    rewards = {"r": np.array([[0.1, 0.2], [0.3, 0.4], [1, 2], [1, 2], [5, 1]]), "nothing": np.full((5, 2), np.nan)}
    measured = measure_point(expert, rewards)
    assert measured["expert_score"]["mean"] == pytest.approx(np.nanmean(expert))
    assert measured["expert_score"]["num"] == 9
    r = measured["rewards"]["r"]
    assert (r["accuracy"]["mean"], r["accuracy"]["num"]) == (pytest.approx(2 / 3), 3)
    assert r["spearman"]["num"] == 9
    assert measured["rewards"]["nothing"] == {"mean": None, "accuracy": None, "spearman": None}


def test_the_quality_of_pairs_is_read_at_every_gamma():
    scores = np.array([[3.0, 1.0], [1.0, 2.0], [2.0, 2.0], [4.0, 0.0]])
    audited = audit(scores, [0.4, 0.5, 0.9, 0.9])
    assert (audited["accuracy"]["mean"], audited["accuracy"]["num"]) == (pytest.approx(2 / 3), 3)
    by_gamma = audited["accuracy_by_gamma"]
    assert by_gamma["0.4"]["mean"] == pytest.approx(2 / 3)
    assert by_gamma["0.5"]["mean"] == 0.5
    assert by_gamma["0.6"]["mean"] == 1.0
    assert by_gamma["1.0"] is None
    assert audit(scores, [None] * 4)["accuracy_by_gamma"] == {}
