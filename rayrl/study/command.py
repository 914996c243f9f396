"""Command `rayrl study`: plan a study, or run it to its tables and its page; again after any interruption.

Exit code 2 for a user's mistake, 1 where cells have failed.
"""

from collections.abc import Sequence

from rayrl.pipelines.command_line import connect_stoppable, stoppable_command
from rayrl.pipelines.stopping import Stopping
from rayrl.study.config import StudyConfig, load_study


def main(path: str, overrides: Sequence[str], *, only_plan: bool) -> int:
    """Run a study, or say what it would do."""

    def command(stopping: Stopping) -> int:
        study = load_study(path, overrides)
        return plan(study) if only_plan else run(study, stopping)

    return stoppable_command(command)


def plan(study: StudyConfig) -> int:
    """Print the cells and what they may pay for. Starts nothing."""
    print(f"study {study.name}: kind {study.kind}, {', '.join(study.arms)}; compared with {study.baseline}")
    if study.kind == "labels":
        from rayrl.study.label_study import plan_labels

        labels = plan_labels(study)
        num_missing = len(labels.missing())
        print(
            f"pool: {labels.counts.num_responses:,} responses, labels are chosen from "
            f"{labels.counts.num_choosable:,}{' pairs' if study.asks == 'pairs' else ''}\n"
            f"oracle: {labels.oracle}, at most {labels.num_queries:,} label queries by all cells together, each once\n"
            f"cells: {len(labels.jobs)}, {num_missing} of them to be done; {_at_once(study)}"
        )
        return 0
    from rayrl.study.run_study import missing_runs, num_queries, plan_runs

    jobs = plan_runs(study)
    keys = {job.run_key for job in missing_runs(study, jobs)}
    print(
        f"oracle: {jobs[0].config.oracle.label()}, at most {num_queries(jobs):,} queries by all runs together: labels, "
        "and those of the evaluation\n"
        f"cells: {len(jobs)}, of {len({job.run_key for job in jobs})} runs; {len(keys)} of these to be done, one at a "
        "time"
    )
    for job in jobs:
        print(f"  {job.cell.title}: {job.policy} of {job.config.run_dir}")
    return 0


def run(study: StudyConfig, stopping: Stopping) -> int:
    """Check everything, run what is missing, and write the table and the page."""
    if study.kind == "labels":
        from rayrl.study.label_study import plan_labels, run_labels

        labels = plan_labels(study, contact_oracle=True)
        if labels.missing():
            connect_stoppable(stopping)
        outcomes = run_labels(labels, stopping)
    else:
        from rayrl.study.run_study import missing_runs, plan_runs, run_runs

        jobs = plan_runs(study, contact_oracle=True)
        if missing_runs(study, jobs):
            connect_stoppable(stopping)
        outcomes = list(run_runs(study, jobs, stopping))
    # Only here: they load scipy and matplotlib.
    from rayrl.study.comparison import Comparison
    from rayrl.study.page import write_page
    from rayrl.study.results import write_gold_table, write_results

    comparison = Comparison(study, outcomes)
    print(f"results: {write_results(study, outcomes)}")
    if gold := write_gold_table(study, outcomes):
        print(f"gold scores along PPO: {gold}")
    print(f"page: {write_page(comparison)}")
    print(comparison.conclusion)
    for outcome in comparison.failed:
        print(f"failed: {outcome.cell.title}: {outcome.failure}")
    if comparison.failed:
        print(f"{len(comparison.failed)} of {len(outcomes)} cells failed; the same command tries them again")
    return 1 if comparison.failed else 0


def _at_once(study: StudyConfig) -> str:
    resources = study.resources
    most = (
        "as many at once as there are CPUs" if resources.max_cells is None else f"at most {resources.max_cells} at once"
    )
    return f"{most}, {resources.cpus_per_cell} CPUs each"
