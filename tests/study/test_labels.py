"""A study of labels from its config to its page, on a made-up pool and a replayed oracle."""

import sqlite3
from dataclasses import replace

import numpy as np
import pyarrow.parquet as pq
import pytest

from rayrl.cli import main
from rayrl.errors import JudgeFailed
from rayrl.study.comparison import Comparison
from rayrl.study.config import load_study
from rayrl.study.label_cells import Job, measure_cell
from rayrl.study.page import render_page
from rayrl.study.pool import STRIDE, StudyPool, held_out_prompts
from rayrl.study.results import Cell, results_table
from tests.study.made_up import write_pool, write_study

ORACLE = """[oracle]
type = "scripted"
function = "tests.study.oracle:judge"
"""


def job(arm, budget=12, seed=0, **changes):
    settings = {
        "held_out": 0.3,
        "split_seed": seed,
        "num_batches": 1,
        "first": None,
        "num_heads": 4,
        "evaluator": "head",
        "oracle": "o",
        "pool": "p",
    }
    return Job(cell=Cell(arm=arm, budget=budget, seed=seed), **(settings | changes))


@pytest.fixture(scope="module")
def pool():
    rng = np.random.default_rng(1)
    ids = np.array([i * STRIDE + j for i in range(30) for j in range(4)])
    return StudyPool(
        key="p",
        ids=ids,
        vectors=rng.standard_normal((120, 5)).astype(np.float32),
        lengths=rng.integers(10, 200, 120),
        prompt_ids=tuple(f"p{i}" for i in range(30)),
    )


def asked_of(pool, *, abstains=lambda identifier: False):
    """An oracle that is linear in the vectors, and the ids that it was asked about, one list per question."""
    scores = pool.vectors @ np.array([1.0, 0.5, 0, 0, 0])
    place = {int(identifier): i for i, identifier in enumerate(pool.ids)}
    asked = []

    def ask(questions, *, held_out=False):
        ids = questions[:, 0].tolist()
        asked.append(ids)
        return [None if abstains(i) else float(scores[place[i]]) for i in ids]

    return ask, asked


def test_labels_come_from_prompts_that_are_not_held_out(pool):
    ask, asked = asked_of(pool)
    measured = {each.measure: each for each in measure_cell(job("k_center"), pool, ask)}
    held_out = set(pool.ids[pool.held_out(0.3, 0)])
    labels, compared = asked
    assert len(labels) == 12 and not held_out & set(labels)
    assert set(compared) == held_out
    assert measured["labels"].mean == 12
    assert measured["pair_accuracy"].num == 9 and set(measured["pair_accuracy"].prompt_ids) <= set(pool.prompt_ids)


def test_everything_is_near_the_truth_and_nothing_is_chance(pool):
    def found(arm):
        return {each.measure: each.mean for each in measure_cell(job(arm, 0), pool, asked_of(pool)[0])}

    assert found("everything")["pair_accuracy"] > 0.98 and found("everything")["regret"] < 0.05
    nothing = found("no labels")
    assert (nothing["pair_accuracy"], nothing["rank_correlation"]) == (0.5, 0.0)
    assert found("length alone")["pair_accuracy_without_length"] == 0.5


def test_abstentions_are_paid_for_and_counted(pool):
    ask, asked = asked_of(pool, abstains=lambda identifier: identifier % STRIDE == 0)
    measured = {each.measure: each.mean for each in measure_cell(job("random"), pool, ask)}
    # Its budget is the most that it may ask for, so that the study's bound holds.
    assert sum(len(ids) for ids in asked[:-1]) == 12
    assert measured["labels"] + measured["abstained"] == 12 and measured["abstained"] > 0


def test_a_cell_is_named_by_all_that_decides_it():
    same, other = job("random"), job("random", num_batches=2)
    assert same.key == job("random").key
    assert len({same.key, other.key, job("random", 13).key, job("random", seed=1).key, job("k_center").key}) == 5


def test_the_split_does_not_depend_on_the_order_of_prompts():
    ids = [f"p{i}" for i in range(20)]
    assert held_out_prompts(ids, 0.25, 3) == held_out_prompts(ids[::-1], 0.25, 3)
    assert held_out_prompts(ids, 0.25, 3) != held_out_prompts(ids, 0.25, 4)
    assert len(held_out_prompts(ids[:2], 0.01, 0)) == len(held_out_prompts(ids[:2], 0.99, 0)) == 1


@pytest.fixture
def folder(tmp_path):
    write_pool(tmp_path)
    return tmp_path


def run(path, *overrides):
    from rayrl.study.label_study import plan_labels, run_labels

    study = load_study(path, list(overrides))
    return study, run_labels(plan_labels(study), None)


def spent(folder):
    with sqlite3.connect(folder / "study" / "ledger.sqlite") as ledger:
        return dict(ledger.execute("select state, count(*) from attempts group by state").fetchall())


def test_a_study_is_run_cached_and_shown(folder, ray_cluster, capsys):
    path = write_study(folder)
    study, outcomes = run(path)
    # Two seeds of three controls and two strategies at two budgets.
    assert len(outcomes) == 2 * (3 + 2 * 2) and not any(outcome.failure for outcome in outcomes)
    assert spent(folder) == {"scored": 160}  # every response once, for all cells together

    table = results_table(study, outcomes)
    assert table.num_rows == sum(len(outcome.measured) for outcome in outcomes)
    comparison = Comparison(study, outcomes)
    assert [(each.arm, each.budget) for each in comparison.differences] == [
        ("k_center", 10),
        ("k_center", 20),
        ("k_center", None),
    ]
    page = render_page(comparison)
    assert comparison.conclusion.split()[0] in ("No", "Take") and "Labels needed" in page and "<script" not in page

    # Its ledger is shown, as a run's is.
    capsys.readouterr()
    with pytest.raises(SystemExit):
        main(["ledger", str(folder / "study")])
    (asked,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("query ")]
    assert asked.split()[-9:-7] == ["160", "160"], asked

    # Another grid finds the cells that it has in common with this one, and asks nothing.
    _, more = run(path, "budgets=[10,20,30]")
    again = [outcome for outcome in more if outcome.cell.budget != 30]
    assert all(outcome.seconds == 0 for outcome in again) and len(again) == len(outcomes)
    assert spent(folder) == {"scored": 160}


def test_a_failing_cell_is_named_and_ends_no_other(folder, ray_cluster):
    from rayrl.study.label_study import plan_labels, run_labels

    study = load_study(write_study(folder, oracle=ORACLE))
    plan = plan_labels(study)
    (broken,) = [job for job in plan.jobs if job.cell == Cell(arm="k_center", budget=20, seed=1)]
    jobs = [replace(job, evaluator="none") if job is broken else job for job in plan.jobs]
    outcomes = run_labels(replace(plan, jobs=jobs), None)
    assert [outcome.cell for outcome in outcomes if outcome.failure] == [broken.cell]
    comparison = Comparison(study, outcomes)
    page = render_page(comparison)
    assert "1 of 14 cells failed and are left out. 1 times: KeyError" in page
    assert "k_center, 20 labels, seed 1" in page
    (row,) = [row for row in results_table(study, outcomes).to_pylist() if row["state"] == "failed"]
    assert (row["arm"], row["budget"], row["seed"], row["mean"]) == ("k_center", 20, 1, None)
    # With 20 labels seed 0 alone has both, and one seed tells nothing apart.
    assert [each.budget for each in comparison.differences] == [10]


def test_a_judge_that_fails_ends_the_study(folder, ray_cluster):
    path = write_study(folder, oracle=ORACLE.replace("judge", "broken_judge"))
    with pytest.raises(JudgeFailed, match="no credit"):
        run(path)
    assert not (folder / "study" / "cells").exists()


def test_a_damaged_result_is_made_again(folder, ray_cluster):
    path = write_study(folder)
    _, outcomes = run(path, "budgets=[10]")
    place = folder / "study" / "cells" / f"{outcomes[-1].key}.parquet"
    place.write_bytes(b"half a fi")
    _, again = run(path, "budgets=[10]")
    assert [outcome.seconds > 0 for outcome in again] == [False] * (len(again) - 1) + [True]
    assert again[-1].measured[0] == outcomes[-1].measured[0]


def test_without_the_ceiling_only_what_is_chosen_is_asked(folder, ray_cluster):
    study, outcomes = run(write_study(folder), "ceiling=false", "split=study")
    assert not any(outcome.failure for outcome in outcomes)
    assert 48 + 20 <= sum(spent(folder).values()) < 160
    assert Comparison(study, outcomes).needed == []


def test_the_table_of_a_study_is_written(folder, ray_cluster):
    from rayrl.study.results import write_results

    study, outcomes = run(write_study(folder), "budgets=[10]")
    table = pq.read_table(write_results(study, outcomes))
    assert set(table["state"].to_pylist()) == {"done"}
    assert {"pair_accuracy", "regret", "labels", "seconds"} <= set(table["measure"].to_pylist())
