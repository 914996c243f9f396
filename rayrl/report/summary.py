"""Summary of a run directory: the facts behind the report, `rayrl runs` and `rayrl status`.

Reads the config, the manifests, the timings, the ledger's counts and the evaluation's table, and changes nothing. What
a run has not reached yet is None: a summary can be made at any time, while the run goes on too.
"""

from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Literal, TypedDict

import numpy as np
import pyarrow as pa

from rayrl.algorithms.estimate import Estimate
from rayrl.algorithms.statistics import paired_difference
from rayrl.config import PanelOracleConfig
from rayrl.errors import DataError
from rayrl.report.caveats import caveats
from rayrl.report.controls import controls
from rayrl.report.facts import (
    Answer,
    Compute,
    Paid,
    PaidQueries,
    PolicyFacts,
    RewardFacts,
    RewardModelFacts,
    RunFacts,
    Sample,
    StageFacts,
    StartUp,
)
from rayrl.report.ledger_counts import ledger_counts
from rayrl.report.people import people_facts
from rayrl.report.policies import latest, policy_titles, reward_titles, trained_policies
from rayrl.report.recorded_run import RecordedRun, read_run, title
from rayrl.report.stage_progress import stage_progress
from rayrl.report.tables import read_parquet
from rayrl.runs import storage
from rayrl.runs.run import Manifest
from rayrl.runs.stage_metrics import EvaluateMetrics, LedgerCounts, RewardModelMetrics, StageMetrics
from rayrl.runs.stage_table import (
    AUDIT_PAIRS,
    DPO,
    EVALUATE,
    FIT_REWARD_MODEL,
    PPO,
    PREFERENCES,
    PSEUDO_LABEL,
    QUERY,
    REFIT_REWARD_MODEL,
    Purpose,
    Stage,
)

NUM_SAMPLES = 20


class Timing(TypedDict):
    """One entry of timings.json that matters here."""

    what: str
    seconds: float


def summarize_run(run_dir: str) -> RunFacts:
    """Summarize one run.

    Raises:
        RunDirectoryError: the folder does not exist or holds no run.
        DataError: one of its files is damaged, or of another version of rayrl.
    """
    run = read_run(run_dir)
    table = read_parquet(run.stage_folder(EVALUATE, 1, "table"))
    evaluated = run.metrics(EVALUATE)
    titles = policy_titles(run.config, None if evaluated is None else list(evaluated.policies))
    policies = _policies(evaluated, titles)
    trained = trained_policies(run.config)
    aligned = trained[0]
    for policy in trained:
        # A study's run may end at plain PPO: then that policy is what it is for.
        if latest(titles, policy.name, run.config.rounds) in titles:
            aligned = policy
    aligned_name = latest(titles, aligned.name, run.config.rounds)
    gain_over_ppo = None
    if len(trained) > 1:
        gain_over_ppo = _gain_over(table, latest(titles, trained[-1].name, run.config.rounds), trained[0].name)
    facts = RunFacts(
        run=run,
        name=run.config.name,
        run_dir=run.url,
        pipeline=run.config.pipeline,
        seed=run.config.seed,
        controls=controls(run.config),
        seconds=_seconds(run, list(run.manifests)),
        stages=_stages(run),
        startup=_add_up(_timings(run.url)),
        paid=_paid(run),
        policies=policies,
        aligned=aligned_name,
        aligned_title=aligned.title,
        gain=_gain(policies, aligned_name),
        gain_over_ppo=gain_over_ppo,
        rewards=_rewards(run, evaluated),
        compute=_compute(run),
        samples=_samples(table, titles),
        caveats=[],
        people=people_facts(run.url, run.config),
    )
    # Caveats are drawn from the other facts.
    return replace(facts, caveats=caveats(facts))


def _stages(run: RecordedRun) -> list[StageFacts]:
    return [_stage(run, stage, number, manifest) for (stage, number), manifest in run.manifests.items()]


def _seconds(run: RecordedRun, stages: Sequence[tuple[Stage, int]]) -> float:
    """Add up the seconds of those of these stages that are finished."""
    seconds = 0.0
    for at in stages:
        manifest = run.manifests[at]
        if manifest is not None:
            seconds += manifest.seconds
    return seconds


def _timings(run_dir: str) -> list[Timing]:
    url = storage.join(run_dir, "timings.json")
    if not storage.exists(url):
        return []
    try:
        return storage.read_json(url)
    except ValueError as error:
        raise DataError(f"{url} must be JSON, but is damaged ({error}): delete it and run again") from None


def _add_up(timings: Sequence[Timing]) -> list[StartUp]:
    """Add up start-up times by what started."""
    seconds: dict[str, list[float]] = {}
    for timing in timings:
        seconds.setdefault(timing["what"], []).append(timing["seconds"])
    return [StartUp(what=what, num=len(times), seconds=sum(times)) for what, times in seconds.items()]


def _stage(run: RecordedRun, stage: Stage, number: int, manifest: Manifest[StageMetrics] | None) -> StageFacts:
    """Describe a stage by its manifest; or say whether it has begun, and how it goes."""
    name = title(stage.name, number)
    if manifest is not None:
        return StageFacts(
            stage=name,
            state="done",
            seconds=manifest.seconds,
            num_rows=manifest.num_rows,
            summary=manifest.summary,
            finished_at=manifest.finished_at,
        )
    # An ensemble's stage has no folder of its own before its first member has one.
    begun = (stage, stage.member(0))
    has_begun = any(storage.exists(run.stage_folder(part, number)) for part in begun)
    state: Literal["started", "not run"] = "started" if has_begun else "not run"
    progress = stage_progress(run, stage, number) if has_begun else None
    summary = None if progress is None else f"{progress.done} {progress.unit} done"
    return StageFacts(stage=name, state=state, summary=summary, progress=progress)


def _policies(evaluated: EvaluateMetrics | None, titles: dict[str, str]) -> list[PolicyFacts]:
    references = None if evaluated is None else evaluated.references
    return [
        PolicyFacts(
            name=name,
            title=shown,
            evaluation=None if evaluated is None else evaluated.policies[name],
            reference=None if references is None else references.policies.get(name),
        )
        for name, shown in titles.items()
    ]


def _gain(policies: list[PolicyFacts], name: str) -> Estimate | None:
    policy = next((policy for policy in policies if policy.name == name), None)
    return None if policy is None or policy.evaluation is None else policy.evaluation.difference


def _gain_over(table: pa.Table | None, name: str, base: str) -> Estimate | None:
    """Paired difference in oracle score of two policies, over the prompts where both were scored."""
    columns = {f"{name}_score", f"{base}_score"}
    if table is None or not columns <= set(table.column_names):
        return None
    ours = np.array(table[f"{name}_score"].to_pylist(), np.float64)
    theirs = np.array(table[f"{base}_score"].to_pylist(), np.float64)
    is_scored = ~(np.isnan(ours) | np.isnan(theirs))
    # The standard error of a single prompt is not known.
    return paired_difference(ours[is_scored], theirs[is_scored]) if is_scored.sum() > 1 else None


def _rewards(run: RecordedRun, evaluated: EvaluateMetrics | None) -> list[RewardFacts]:
    measured = {} if evaluated is None else evaluated.rewards
    models = {"r": run.last(FIT_REWARD_MODEL), "refreshed": run.last(REFIT_REWARD_MODEL)}
    rewards: list[RewardFacts] = []
    for name, shown in reward_titles(run.config).items():
        newest = latest(measured, name, run.config.rounds)
        rewards.append(
            RewardFacts(
                name=name,
                title=shown,
                agreement=measured.get(newest, {}),
                model=_reward_model(models.get(name)),
            )
        )
    return rewards


def _reward_model(metrics: RewardModelMetrics | None) -> RewardModelFacts | None:
    if metrics is None:
        return None
    error = metrics.validation.calibration_error
    if len(metrics.members) > 1:
        # The combined rewards of an ensemble are standardised: their margins are no log-odds.
        errors = [member.validation.calibration_error for member in metrics.members]
        known = [error for error in errors if error is not None]
        error = float(np.mean(known)) if known else None
    return RewardModelFacts(
        num_members=len(metrics.members),
        num_pairs=metrics.num_pairs,
        validation=metrics.validation,
        calibration_error=error,
    )


def _paid(run: RecordedRun) -> Paid:
    live = ledger_counts(run.url, run.config)
    label, evaluate = _paid_queries(run, "label", live), _paid_queries(run, "evaluate", live)
    test, people = _paid_queries(run, "test", live), _paid_queries(run, "people", live)
    labelled = run.all_rounds(PSEUDO_LABEL)
    if not labelled:
        preferences = run.last(PREFERENCES)
        return Paid(
            label=label,
            evaluate=evaluate,
            test=test,
            people=people,
            num_pairs=None if preferences is None else preferences.num_pairs,  # with those of earlier rounds
            num_scored=None,
            num_ties=None,
            num_synthetic=None,
            pairs_per_query=None,
        )
    num_pairs = sum(metrics.num_pairs for metrics in labelled)
    num_synthetic = sum(metrics.num_synthetic for metrics in labelled)
    return Paid(
        label=label,
        evaluate=evaluate,
        test=test,
        people=people,
        num_pairs=num_pairs,
        num_scored=sum(metrics.num_scored for metrics in labelled),
        num_ties=sum(metrics.num_ties for metrics in labelled),
        num_synthetic=num_synthetic if run.config.pseudo_label.synthetic else None,
        pairs_per_query=num_pairs / label.spent if label.spent else None,
    )


def _paid_queries(run: RecordedRun, purpose: Purpose, live: dict[str, LedgerCounts]) -> PaidQueries:
    """Count the queries of one purpose over all rounds; `live` is what the ledger itself counts."""
    config = run.config
    if purpose == "test":
        budget = 0  # it is no setting: the ledger has a cap of its own
    elif purpose == "people":
        budget = config.oracle.people_budget if isinstance(config.oracle, PanelOracleConfig) else 0
    elif purpose == "evaluate":
        budget = config.evaluate.budget + config.evaluate.diagnosis_budget
    elif config.learns_from_judgements or config.asks_for_comparisons:
        budget = config.select.budget
    else:
        return PaidQueries(budget=0, spent=0)
    counts = None
    for ledger in _recorded_ledgers(run):
        if purpose in ledger:
            counts = ledger[purpose]
            # The ledger's cap is lower than the config's budget where there is less to ask.
            budget = counts.budget
    # The ledger itself is newer than any manifest, while the run goes on. Its file does not keep the budget.
    if purpose in live:
        counts = replace(live[purpose], budget=budget)
    return PaidQueries(budget=budget) if counts is None else PaidQueries(**asdict(counts))


def _recorded_ledgers(run: RecordedRun) -> list[dict[str, LedgerCounts]]:
    """Collect the ledger's counts as of the end of each stage that keeps them, oldest first."""
    ledgers = [metrics.ledger for metrics in run.all_rounds(QUERY)]
    for preferences in run.all_rounds(PREFERENCES):
        if preferences.asked is not None:
            ledgers.append(preferences.asked.ledger)
    audited, evaluated = run.metrics(AUDIT_PAIRS), run.metrics(EVALUATE)
    if audited is not None:
        ledgers.append(audited.ledger)
    if evaluated is not None:
        ledgers.append(evaluated.ledger)
    return ledgers


def _compute(run: RecordedRun) -> Compute:
    """Add up seconds of finished stages: to the end of the first policy, after it, and of measuring."""
    training = [at for at in run.manifests if at[0].place != "end"]
    measuring = [at for at in run.manifests if at[0].place == "end"]
    first_policy = (DPO if run.has(DPO) else PPO, 1)
    num_first = training.index(first_policy) + 1
    # Each part is over when the last of its stages is.
    first_s = _seconds(run, training[:num_first]) if _is_over(run, training[:num_first]) else None
    added_s = _seconds(run, training[num_first:]) if _is_over(run, training[num_first:]) else None
    training_s = _seconds(run, training) if first_s is not None and _is_over(run, training) else None
    return Compute(
        first_policy_s=first_s,
        added_s=added_s,
        training_s=training_s,
        ratio=training_s / first_s if training_s is not None and first_s else None,
        evaluate_s=_seconds(run, measuring) if _is_over(run, measuring) else None,
    )


def _is_over(run: RecordedRun, stages: Sequence[tuple[Stage, int]]) -> bool:
    """Return whether the last of these stages is finished."""
    return bool(stages) and run.manifests[stages[-1]] is not None


def _samples(table: pa.Table | None, titles: dict[str, str]) -> list[Sample]:
    """Take evenly spaced rows of the evaluation's table: shown as they come, not picked."""
    if table is None or not table.num_rows:
        return []
    places = np.linspace(0, table.num_rows - 1, min(NUM_SAMPLES, table.num_rows)).astype(int)
    names = [name for name in titles if f"{name}_response" in table.column_names]
    samples: list[Sample] = []
    for row in table.take(places).to_pylist():
        answers: dict[str, Answer] = {}
        for name in names:
            answers[name] = Answer(
                response=row[f"{name}_response"], score=row[f"{name}_score"], num_tokens=row[f"{name}_num_tokens"]
            )
        samples.append(Sample(prompt=row["prompt"], answers=answers))
    return samples
