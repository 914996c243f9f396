"""Studies of runs: which runs there are, what they share, and what is read of them. No run is made here."""

import math
from itertools import product
from pathlib import Path

import pytest

from rayrl.errors import ConfigError, DiskFull
from rayrl.runs import storage
from rayrl.study.command import plan
from rayrl.study.comparison import EVERYTHING, Comparison
from rayrl.study.config import AGREEMENT_MEASURES, RUN_MEASURES, load_study
from rayrl.study.page import render_page
from rayrl.study.results import Cell, Outcome, counted, estimated, outcome_of, read_result, write_result
from rayrl.study.run_measures import measure_run
from rayrl.study.run_study import _jobs, missing_runs, num_queries, plan_runs, run_runs
from tests.report.made_up_runs import write_proxy_dpo_run, write_rlp_run

STUDIES = Path("jobs/configs/studies")


def quickstart(folder, *overrides):
    """The study of proxy DPO, on the quickstart."""
    return load_study(
        STUDIES / "proxy_dpo.toml",
        ["base=jobs/configs/quickstart.toml", f"study_dir={folder}", "seeds=[0,1]", *overrides],
    )


def test_the_cells_of_a_seed_share_the_first_run_and_all_share_one_ledger(tmp_path):
    jobs = plan_runs(quickstart(tmp_path))
    # Two strategies and five variants; M1 is a policy of the first one's run.
    assert [job.cell.arm for job in jobs[:7]] == [
        "k_center",
        "random",
        "m1",
        "off-policy",
        "direct",
        "expert",
        "shuffled",
    ]
    assert len(jobs) == 14 and len({job.run_key for job in jobs}) == 12
    first, random, m1 = jobs[:3]
    assert (m1.run_key, m1.config.run_dir, m1.policy, first.policy) == (first.run_key, first.config.run_dir, "m1", "m2")
    assert (first.reuse, random.reuse) == (None, first.config.run_dir)
    assert jobs[8].reuse == jobs[7].config.run_dir  # of its own seed
    assert {job.config.oracle.ledger for job in jobs} == {storage.join(str(tmp_path), "ledger.sqlite")}
    assert {job.config.seed for job in jobs} == {0, 1}
    assert jobs[4].config.labels == "direct" and jobs[4].config.select.unit == "prompt"


def test_a_run_keeps_its_folder_when_the_grid_changes(tmp_path):
    before = {job.run_key: job.config.run_dir for job in plan_runs(quickstart(tmp_path))}
    for folder in before.values():
        Path(folder).mkdir(parents=True)
    after = plan_runs(quickstart(tmp_path, "grid.dpo.beta=[0.1,0.3]", 'strategies=["random","k_center"]'))
    common = [job for job in after if job.run_key in before]
    assert len({job.run_key for job in common}) == len(before)  # beta = 0.1 is the default
    assert all(job.config.run_dir == before[job.run_key] for job in common)


def test_arms_come_after_those_that_they_reuse(tmp_path):
    study = load_study(
        STUDIES / "rlp.toml",
        [
            f"study_dir={tmp_path}",
            "base=jobs/configs/rlp_quickstart.toml",
            "set.evaluate.best_of_n=4",
            "set.evaluate.budget=400",
            "seeds=[0,1]",
            "variants.spg.reuse=uml",
        ],
    )
    jobs = plan_runs(study)
    arms = [job.cell.arm for job in jobs]
    assert arms[:2] == ["uml", "spg"]
    by_arm = {job.cell.arm: job for job in jobs if job.cell.seed == 0}
    worst = by_arm["ensemble-worst-case"]
    assert worst.reuse == by_arm["ensemble-mean"].config.run_dir
    assert worst.pipeline == "jobs.bench.plain_rlhf:first_ppo_only" and worst.policy == "ppo"
    assert by_arm["ppo"].run_key == by_arm["spg"].run_key != by_arm["uml"].run_key


def test_a_cell_that_a_run_would_refuse_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"dpo\.beta"):
        plan_runs(quickstart(tmp_path, "grid.dpo.beta=[0.1,-1]"))
    with pytest.raises(ConfigError, match=r'variants\.m1\.policy must be one of m1, m2, .* got "ppo"; correct it'):
        plan_runs(quickstart(tmp_path, "variants.m1.policy=ppo"))
    with pytest.raises(ConfigError, match=r"variants\.direct\.pipeline.*has no function nothing"):
        plan_runs(quickstart(tmp_path, "variants.direct.pipeline=jobs.bench.plain_rlhf:nothing"))


def test_runs_are_bounded_in_what_they_pay_for_together(tmp_path):
    jobs = plan_runs(quickstart(tmp_path))
    by_arm = {job.cell.arm: job.num_queries for job in jobs}
    # 96 labels and 200 answers of the evaluation; the ceiling pays for every response. M1 is of the first one's run.
    config = jobs[0].config
    assert by_arm["k_center"] == by_arm["m1"] == config.select.budget + config.evaluate.budget
    assert by_arm["expert"] > 10 * by_arm["k_center"]
    each_seed = sum(num for arm, num in by_arm.items() if arm != "m1")
    assert num_queries(jobs) == 2 * each_seed
    refused = (
        f"max_queries must cover the study, whose 12 runs may ask for {2 * each_seed:,} .*, got {2 * each_seed - 1:,}"
    )
    with pytest.raises(ConfigError, match=refused):
        plan_runs(quickstart(tmp_path, f"max_queries={2 * each_seed - 1}"))
    assert len(plan_runs(quickstart(tmp_path, f"max_queries={2 * each_seed}"))) == len(jobs)


def test_the_plan_of_runs_tells_the_queries(tmp_path, capsys):
    assert plan(quickstart(tmp_path, 'rows=["random"]')) == 0
    assert "at most 592 queries by all runs together" in capsys.readouterr().out


def test_known_results_are_read_and_nothing_is_run(tmp_path):
    study = quickstart(tmp_path)
    jobs = plan_runs(study)
    for job in jobs:
        gain = 1.0 + 0.1 * job.cell.seed - (job.cell.arm == "shuffled")
        values = {f"p{i}": gain + 0.01 * i for i in range(5)}
        write_result(study.study_dir, job.key, [estimated("gain", values), counted("labels", 96)])
    assert missing_runs(study, jobs) == []
    outcomes = list(run_runs(study, jobs, None))
    comparison = Comparison(study, outcomes)
    assert comparison.control_cells(EVERYTHING, ()).keys() == {0, 1}
    shuffled = [each for each in comparison.differences if each.arm == "shuffled"]
    assert [(each.budget, round(each.difference.mean, 6)) for each in shuffled] == [(96, -1.0)]
    page = render_page(comparison)
    assert "the oracle labels everything (ceiling)" in page and "paid scores shuffled (floor)" in page


def test_ratios_are_taken_against_a_baseline_that_is_a_variant(tmp_path):
    study = quickstart(tmp_path, "baseline=direct", "budgets=[16,32]", 'measures=["gain"]')
    gains = {"k_center": (0.9, 1.0), "random": (0.9, 1.0), "direct": (0.45, 0.9), "expert": (1.0, 1.0)}
    outcomes = []
    for arm, budget, seed in product(gains, (16, 32), (0, 1)):
        values = {f"p{i}": gains[arm][budget == 32] + 0.001 * math.sin(i + seed) for i in range(20)}
        cell = Cell(arm=arm, budget=budget, seed=seed)
        outcomes.append(Outcome(cell=cell, key=f"{arm}{budget}{seed}", measured=[estimated("gain", values)]))
    needed = {(each.arm, each.share): each for each in Comparison(study, outcomes).needed}
    assert {arm for arm, _ in needed} == {"direct", "k_center", "random"}
    assert needed["direct", 0.9].labels == pytest.approx(32, abs=0.1)
    assert [needed[arm, 0.9].ratio for arm in ("direct", "random")] == [1.0, pytest.approx(2, abs=0.01)]


@pytest.mark.parametrize(("measure", "of_m1"), [("gain", 0.0), ("win_rate", 0.5), ("score", None)])
def test_what_labels_gain_is_counted_from_m1(tmp_path, measure, of_m1):
    study = quickstart(tmp_path, f'measures=["{measure}"]')
    outcomes = [
        Outcome(cell=Cell(arm="expert", budget=96, seed=seed), key=f"{seed}", measured=[estimated(measure, {"p": 0.9})])
        for seed in (0, 1)
    ]
    reachable = Comparison(study, outcomes).reachable(())
    # A score of M1 is no constant: nothing is told of it.
    assert reachable == ({} if of_m1 is None else {seed: ({"p": of_m1}, {"p": 0.9}) for seed in (0, 1)})


def test_a_cell_that_fails_is_named_and_one_that_no_other_could_survive_ends_the_study(tmp_path):
    cell = Cell(arm="direct", budget=96, seed=0)

    def outcome(error):
        def measure():
            if error is not None:
                raise error
            return [estimated("gain", {"p": 1.0, "q": 0.5})]

        return outcome_of(cell, "k", str(tmp_path), measure, fatal=(DiskFull,))

    failed = outcome(KeyError("score"))
    assert (failed.cell, failed.failure, failed.measured) == (cell, "KeyError: 'score'", ())
    assert read_result(str(tmp_path), "k") is None
    with pytest.raises(DiskFull):
        outcome(DiskFull("no space"))
    assert outcome(None).measured == read_result(str(tmp_path), "k") == [estimated("gain", {"p": 1.0, "q": 0.5})]


def test_a_failed_run_is_told(tmp_path):
    study = quickstart(tmp_path)
    cell = Cell(arm="direct", budget=96, seed=0)
    page = render_page(Comparison(study, [Outcome(cell=cell, key="k", failure="StageTimeout: waited <10 s")]))
    assert "1 of 1 cells failed" in page and "waited &lt;10 s" in page


def test_measures_of_a_finished_run(tmp_path):
    folder = str(write_proxy_dpo_run(tmp_path))
    measured = {each.measure: each for each in measure_run(folder, "m2", 1)}
    assert {"gain", "score", "win_rate", "kl", "perplexity", "distinct2", "tokens", "labels"} <= measured.keys()
    assert measured["gain"].num == len(measured["gain"].values) > 1
    m1 = {each.measure: each for each in measure_run(folder, "m1", 1)}
    assert m1["gain"].mean == 0
    with pytest.raises(Exception, match=r"variants\.policy must be one of the run's policies, m1, m2, got ppo"):
        measure_run(folder, "ppo", 1)


def test_measures_of_reward_models(tmp_path):
    folder = str(write_rlp_run(tmp_path))
    measured = {each.measure for each in measure_run(folder, "rlp", 1)}
    assert {
        "agreement_r_held_out",
        "agreement_refreshed_held_out",
        "agreement_r_ppo_against_m1",
        "agreement_r_pairs_of_ppo",
        "agreement_refreshed_pairs_of_ppo_refreshed",
    } <= measured
    assert measured <= {*RUN_MEASURES, *AGREEMENT_MEASURES}


def test_a_variant_that_replaces_a_typed_table_keeps_the_grids_setting_in_it(tmp_path):
    study = [f"study_dir={tmp_path}", "base=jobs/configs/quickstart.toml", "seeds=[0,1]", 'rows=["random","other"]']
    typed = 'variants.other.set.oracle={type="replay", path="jobs/quickstart/seed.jsonl"}'
    jobs = plan_of(*study, typed, "grid.oracle.max_retries=[1,2]")
    others = [job.config.oracle for job in jobs if job.cell.arm == "other"]
    assert {(oracle.type, oracle.max_retries) for oracle in others} == {("replay", 1), ("replay", 2)}

    # The other way round: the grid has the table, and the variant a setting in it.
    tables = 'grid.oracle=[{type="scripted", function="a:b"}, {type="replay", path="jobs/quickstart/seed.jsonl"}]'
    jobs = plan_of(*study, "variants.other.set.oracle.max_retries=7", tables)
    others = [job.config.oracle for job in jobs if job.cell.arm == "other"]
    assert {(oracle.type, oracle.max_retries) for oracle in others} == {("scripted", 7), ("replay", 7)}

    # A setting that the new table does not have is refused, and not dropped.
    with pytest.raises(ConfigError, match=r"oracle\.function: is a setting of type .scripted."):
        plan_of(*study, typed, 'grid.oracle.function=["a:b","c:d"]')


def plan_of(*overrides):
    """The runs of the study of proxy DPO, without the preflight's checks of each."""
    return _jobs(load_study(STUDIES / "proxy_dpo.toml", list(overrides)))
