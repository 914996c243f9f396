"""Gold scores along PPO: read off the answers that a PPO has kept, fitted, drawn. No run is made here."""

import math
import re
from pathlib import Path

import pytest

from rayrl.algorithms.overoptimisation import GoldCurve
from rayrl.config import RunConfig
from rayrl.data.blocks import BlockTable
from rayrl.errors import ConfigError, DataError
from rayrl.metrics.curves import MetricLog
from rayrl.records import HeldOutAnswer, to_table
from rayrl.study.comparison import Comparison
from rayrl.study.config import load_study
from rayrl.study.gold import measure_gold, policy_kls
from rayrl.study.overoptimisation import gold_rows
from rayrl.study.page import draw_figures, render_page
from rayrl.study.results import (
    Cell,
    GoldPoint,
    Outcome,
    estimated,
    read_gold,
    write_gold,
    write_gold_table,
    write_result,
)
from rayrl.study.run_study import missing_runs, plan_runs, run_runs

STUDY = "jobs/configs/studies/overoptimisation.toml"
NUM_PROMPTS = 6


def config_of(folder, function="tests.oracles.length_oracle:judge"):
    content = {
        "name": "gold",
        "run_dir": str(folder),
        "pipeline": "rlp",
        "policy": {"path": "model"},
        "pool": {"path": "prompts.jsonl"},
        "sft": {"enabled": False},
        "oracle": {"type": "scripted", "function": function},
        "preferences": {"data": {"path": "pairs.jsonl"}},
    }
    return RunConfig.model_validate(content)


def write_ppo(folder, stage, kls, responses):
    """A PPO of which M1 and every second step were measured.

    Args:
        folder: of the run.
        stage: name of the PPO.
        kls: of the rollouts, from step 1 on.
        responses: makes the response at (step, prompt, which of two).
    """
    with MetricLog(str(folder), stage) as log:
        log.log(0, held_out_reward=0.0)
        for step, kl in enumerate(kls, 1):
            measured = {"held_out_reward": 0.0} if step % 2 == 0 else {}
            log.log(step, kl=kl, updates_behind=0, **measured)
    for step in range(0, len(kls) + 1, 2):
        answers = [
            HeldOutAnswer(
                prompt_id=f"p{i}",
                prompt=f"Count to {i}.",
                prompt_token_ids=[1],
                response=responses(step, i, n),
                token_ids=[2],
                reward=float(step),
            )
            for i in range(NUM_PROMPTS)
            for n in range(2)
        ]
        BlockTable(f"{folder}/stages/{stage}/held_out/{step}", 1).write(0, to_table(answers, HeldOutAnswer))


def digits(step, prompt, which):
    """As many digits as half the step, and one more in every second answer."""
    return "7" * (step // 2 + which)


def test_a_policys_kl_is_that_of_the_rollout_that_it_wrote(tmp_path):
    rows = [{"step": 0, "held_out_reward": 0.1}]
    rows += [{"step": step, "kl": kl, "updates_behind": 0} for step, kl in enumerate((-0.01, 0.5, 1.0, 2.0), 1)]
    for step in (1, 2, 4):
        rows[step]["held_out_reward"] = None  # measured, and not finite
    assert policy_kls(rows) == {0: 0.0, 1: 0.5, 2: 1.0, 4: 2.0}
    behind = [row | {"updates_behind": 1} if row["step"] > 2 else row for row in rows]
    assert policy_kls(behind)[2] == 2.0  # of the fourth rollout, which was written with the weights after step 2


def test_the_kept_answers_are_scored_by_prompt_and_compared_with_m1s(tmp_path):
    write_ppo(tmp_path, "ppo", [0.0, 0.2, 0.5, 1.0], digits)
    points = measure_gold(str(tmp_path), config_of(tmp_path), "ppo", 100)
    assert [(p.step, p.kl, p.score, p.reward, p.gain, p.num) for p in points] == [
        (0, 0.0, 0.5, 0.0, 0.0, NUM_PROMPTS),
        (2, 0.5, 1.5, 2.0, 1.0, NUM_PROMPTS),
        (4, 1.0, 2.5, 4.0, 2.0, NUM_PROMPTS),
    ]
    assert points[1].standard_error == 0
    few = measure_gold(str(tmp_path), config_of(tmp_path), "ppo", 4)
    assert {point.num for point in few} == {2}  # two answers to a prompt


def test_every_policy_has_the_answers_of_its_own_ppo(tmp_path):
    write_ppo(tmp_path, "ppo", [0.0, 0.2], digits)
    write_ppo(tmp_path, "ppo_refreshed", [0.0, 0.2, 0.5, 1.0], lambda step, i, n: "no digit")
    write_ppo(tmp_path / "rounds" / "2", "ppo", [0.0, 0.2, 0.3, 0.4], digits)
    config = config_of(tmp_path)
    assert [p.gain for p in measure_gold(str(tmp_path), config, "rlp", 100)] == [0, 0, 0]
    assert len(measure_gold(str(tmp_path), config, "ppo", 100)) == 2
    assert len(measure_gold(str(tmp_path), config, "ppo-2", 100)) == 3
    for without in ("m1", "best_of_n"):
        assert measure_gold(str(tmp_path), config, without, 100) == []


def test_abstentions_are_left_out_and_an_expert_without_a_score_of_m1_is_refused(tmp_path):
    # This expert scores from 0 to 5: seven digits are off the scale.
    write_ppo(tmp_path, "ppo", [0.0, 0.2], lambda step, i, n: "7" * (7 if step and i < 2 else 1))
    points = measure_gold(str(tmp_path), config_of(tmp_path), "ppo", 100)
    assert [(point.num, point.gain) for point in points] == [(NUM_PROMPTS, 0.0), (NUM_PROMPTS - 2, 0.0)]
    write_ppo(tmp_path, "ppo", [0.0, 0.2], lambda step, i, n: "7" * 7)
    with pytest.raises(DataError, match="must score M1's answers, which ppo has kept, and has scored none"):
        measure_gold(str(tmp_path), config_of(tmp_path), "ppo", 100)


def study_of(folder, *overrides):
    return load_study(STUDY, [f"study_dir={folder}", "seeds=[0,1]", 'rows=["spg","ppo","best-of-n"]', *overrides])


def outcomes_of(study, curves, *, kls=(0.0, 0.5, 2.0, 6.0, 12.0, 20.0)):
    """Outcomes whose gold scores lie on known curves, moved a little from seed to seed."""
    found = []
    for arm, curve in curves.items():
        for seed in study.seeds:
            moved = GoldCurve(alpha=curve.alpha + 0.01 * seed, beta=curve.beta)
            points = []
            for step, kl in enumerate(kls):
                gain = moved.at(math.sqrt(kl))
                points.append(
                    GoldPoint(step=step, kl=kl, score=2 + gain, reward=3 * gain, gain=gain, standard_error=0.05, num=50)
                )
            values = {f"p{i}": points[-1].gain + 0.01 * i for i in range(5)}
            cell = Cell(arm=arm, budget=32, seed=seed)
            found.append(Outcome(cell=cell, key=f"{arm}{seed}", measured=[estimated("gain", values)], gold=points))
    return found


CURVES = {"ppo": GoldCurve(alpha=1.0, beta=0.6), "spg": GoldCurve(alpha=1.0, beta=0.1)}


def test_each_row_is_fitted_and_told_where_it_turns(tmp_path):
    study = study_of(tmp_path)
    spg, ppo = gold_rows(study, outcomes_of(study, CURVES))
    assert (spg.arm, ppo.arm) == ("spg", "ppo")
    assert ppo.turn.root_kl == pytest.approx(math.exp(1.005 / 0.6 - 1))
    assert ppo.turn.low < ppo.turn.root_kl < ppo.turn.high
    assert ppo.reached == pytest.approx(math.sqrt(20))
    expected = ppo.mean.at(ppo.turn.root_kl) - ppo.mean.at(math.sqrt(20))
    assert ppo.lost.mean == pytest.approx(expected) and ppo.lost.mean > 0
    assert ppo.at_the_end.mean == pytest.approx(ppo.mean.at(math.sqrt(20)))
    best, distance = ppo.best_measured()
    assert distance == pytest.approx(math.sqrt(6)) and best.mean == pytest.approx(ppo.mean.at(distance))
    assert ppo.rewards() == (0, pytest.approx(3 * ppo.at_the_end.mean))
    assert spg.lost is None and spg.turn.root_kl > spg.reached


def test_the_page_shows_the_curves_and_where_they_turn(tmp_path):
    study = study_of(tmp_path)
    comparison = Comparison(study, outcomes_of(study, CURVES))
    assert draw_figures(comparison).keys() == {"curves0", "gold0"}
    page = render_page(comparison)
    assert "Over-optimisation" in page and "Gold score along PPO, 32 labels" in page
    assert re.search(r"plain PPO on the old reward model</td>\s*<td[^>]*>2</td>\s*<td[^>]*>4.47</td>", page)
    without = [Outcome(cell=each.cell, key=each.key, measured=each.measured) for each in comparison.outcomes]
    assert "Over-optimisation" not in render_page(Comparison(study, without))


def test_seeds_that_did_not_move_are_left_out(tmp_path):
    study = study_of(tmp_path)
    assert gold_rows(study, outcomes_of(study, CURVES, kls=(0.0, 0.0))) == []


def test_gold_scores_are_kept_beside_results_and_read_again(tmp_path):
    study = study_of(tmp_path)
    jobs = plan_runs(study)
    points = outcomes_of(study, CURVES)[0].gold
    for job in jobs:
        write_result(study.study_dir, job.key, [estimated("gain", {"p": 1.0})])
    assert len(missing_runs(study, jobs)) == len(jobs)  # without gold scores they are not whole
    for job in jobs:
        write_gold(study.study_dir, job.key, points)
    assert missing_runs(study, jobs) == [] and read_gold(study.study_dir, jobs[0].key) == points
    outcomes = list(run_runs(study, jobs, None))
    assert outcomes[0].gold == points
    assert Path(write_gold_table(study, outcomes)).name == "gold.parquet"
    plain = {job.cell: job.key for job in plan_runs(study_of(tmp_path, "gold_answers=0"))}
    assert all(plain[job.cell] != job.key for job in jobs)


def test_gold_scores_of_a_paid_expert_and_of_runs_without_ppo_are_refused(tmp_path):
    http = 'set.oracle={type="http", base_url="http://127.0.0.1:1", model="m"}'
    with pytest.raises(ConfigError, match=r'gold_answers must be 0 where oracle.type is "http", which may be paid'):
        plan_runs(study_of(tmp_path, http))
    proxy = ["base=jobs/configs/quickstart.toml", f"study_dir={tmp_path}", "seeds=[0,1]", "gold_answers=8"]
    with pytest.raises(ConfigError, match=r'gold_answers must be 0 where pipeline is "proxy_dpo", which has no PPO'):
        plan_runs(load_study("jobs/configs/studies/proxy_dpo.toml", proxy))
    labels = ["gold_answers=8", f"study_dir={tmp_path}"]
    with pytest.raises(ConfigError, match='gold_answers must be 0 where kind is "labels", got 8'):
        load_study("jobs/configs/studies/labels.toml", labels)


def test_the_study_flips_comparisons_and_no_score(tmp_path):
    configs = [job.config for job in plan_runs(study_of(tmp_path))]
    assert {config.oracle.flip_probability for config in configs} == {0.25}
    assert all(config.oracle.is_free() and config.oracle.flips_comparisons() for config in configs)
