"""Measures of a study of runs: what a finished run's evaluation says of one of its policies, and of its rewards."""

# pyarrow has no type stubs.
# pyright: reportMissingTypeStubs=false, reportUnknownMemberType=false, reportUnknownVariableType=false

from collections.abc import Mapping

from rayrl.algorithms.estimate import Estimate
from rayrl.errors import DataError
from rayrl.report.tables import read_parquet
from rayrl.runs import storage
from rayrl.runs.run import read_manifest, round_folder
from rayrl.runs.stage_metrics import M1, EvaluateMetrics, PolicyEvaluation
from rayrl.runs.stage_table import (
    EVALUATE,
    FIT_REWARD_MODEL,
    PPO,
    PPO_REFRESHED,
    PREFERENCES,
    QUERY,
    REFIT_REWARD_MODEL,
    TRACK_REWARDS,
)
from rayrl.study.results import Measured, counted, estimated

REWARD_MODELS = {"r": FIT_REWARD_MODEL, "refreshed": REFIT_REWARD_MODEL}
"""Stages that fit a reward model, by the name that evaluation and tracking give it."""


def measure_run(folder: str, policy: str, num_rounds: int) -> list[Measured]:
    """Read the measures of a policy of a finished run.

    Raises:
        DataError: the run is not finished, or has no such policy.
    """
    manifest = read_manifest(folder, EVALUATE)
    if manifest is None:
        raise DataError(f"{folder} must be a finished run, and has not finished {EVALUATE.name}; run the study again")
    evaluated = manifest.metrics
    if policy not in evaluated.policies:
        raise DataError(
            f"variants.policy must be one of the run's policies, {', '.join(evaluated.policies)}, got {policy}; "
            "correct it"
        )
    measured = _of_policy(folder, policy, evaluated.policies[policy])
    if evaluated.references is not None and policy in evaluated.references.policies:
        measured += _known("against_references", evaluated.references.policies[policy].win_rate)
    return [*measured, counted("labels", _num_labels(folder, num_rounds)), *_agreements(folder, evaluated)]


def _of_policy(folder: str, policy: str, evaluation: PolicyEvaluation) -> list[Measured]:
    """Measures of the policy's answers; scores by prompt, so that policies can be paired."""
    scores, base = oracle_scores(folder, policy), oracle_scores(folder, M1)
    both = sorted(scores.keys() & base.keys())
    measured: list[Measured] = []
    if both:
        measured.append(estimated("gain", {prompt: scores[prompt] - base[prompt] for prompt in both}))
        measured.append(estimated("score", {prompt: scores[prompt] for prompt in both}))
        wins = {prompt: _win(scores[prompt], base[prompt]) for prompt in both}
        measured.append(estimated("win_rate", wins))
    measured += _known("length_controlled_win_rate", evaluation.length_controlled_win_rate)
    measured += _known("kl", evaluation.kl)
    if evaluation.perplexity is not None:
        measured.append(counted("perplexity", evaluation.perplexity))
    return [*measured, counted("distinct2", evaluation.distinct2), counted("tokens", evaluation.length)]


def _win(score: float, base: float) -> float:
    return 0.5 if score == base else float(score > base)


def oracle_scores(folder: str, policy: str) -> dict[str, float]:
    """Read the oracle's score of a policy's answer, by prompt; abstentions are left out."""
    table = read_parquet(storage.join(folder, "stages", EVALUATE.name, "table"))
    if table is None or f"{policy}_score" not in table.column_names:
        return {}
    rows = zip(table["prompt_id"].to_pylist(), table[f"{policy}_score"].to_pylist(), strict=True)
    return {prompt: score for prompt, score in rows if score is not None}


def _num_labels(folder: str, num_rounds: int) -> int:
    """Count the oracle's answers that a run learnt from, whoever paid for them."""
    total = 0
    for number in range(1, num_rounds + 1):
        url = round_folder(folder, number)
        judged, compared = read_manifest(url, QUERY), read_manifest(url, PREFERENCES)
        if judged is not None:
            total += judged.metrics.num_scored
        if compared is not None and compared.metrics.asked is not None:
            total += compared.metrics.asked.num_asked
    return total


def _agreements(folder: str, evaluated: EvaluateMetrics) -> list[Measured]:
    """Share of pairs that each reward model orders as the oracle does: on held-out pairs, and on policies' answers."""
    measured: list[Measured] = []
    tracked = read_manifest(folder, TRACK_REWARDS)
    for reward, stage in REWARD_MODELS.items():
        model = read_manifest(folder, stage)
        if model is not None:
            measured += _known(f"agreement_{reward}_held_out", model.metrics.validation.accuracy)
        of_policies = evaluated.rewards.get(reward, {})
        if "ppo" in of_policies:
            measured += _known(f"agreement_{reward}_ppo_against_m1", of_policies["ppo"].accuracy)
        for ppo in (PPO, PPO_REFRESHED) if tracked is not None else ():
            points = [point for point in tracked.metrics.points if point.ppo == ppo.name] if tracked else []
            at_the_end: Mapping[str, Estimate | None] = (
                {name: each.accuracy for name, each in points[-1].rewards.items()} if points else {}
            )
            measured += _known(f"agreement_{reward}_pairs_of_{ppo.name}", at_the_end.get(reward))
    return measured


def _known(name: str, estimate: Estimate | None) -> list[Measured]:
    """Make a measure of an estimate; none where there is none."""
    if estimate is None:
        return []
    return [Measured(measure=name, mean=estimate.mean, standard_error=estimate.standard_error, num=estimate.num)]
