"""Several answers to one question, of one judge or of several, made one: mean of scores, majority of preferences."""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import replace

from rayrl.oracles.protocol import PREFERENCE_SHARES, Verdict

Combine = Callable[[Sequence[float]], float]


def mean(scores: Sequence[float]) -> float:
    """Average scores."""
    return statistics.fmean(scores)


def most_frequent(scores: Sequence[float]) -> float:
    """Return the score of more than half of the judges; without one, their median."""
    most = statistics.mode(scores)
    return most if 2 * scores.count(most) > len(scores) else statistics.median(scores)


def majority(shares: Sequence[float]) -> float:
    """Return the preference of more than half of the samples, else a tie; both as shares of the first response."""
    most = statistics.mode(shares)
    return most if 2 * shares.count(most) > len(shares) else PREFERENCE_SHARES["tie"]


def has_too_few(verdicts: Sequence[Verdict], num_samples: int) -> bool:
    """Return whether so many samples have no score that fewer than half of all will have one."""
    return 2 * sum(verdict.score is None for verdict in verdicts) > num_samples


def combined(verdicts: Sequence[Verdict], num_samples: int, combine: Combine, *, of: str = "samples") -> Verdict:
    """Make one verdict of those that were asked for, one of which may be a judge's failure.

    It costs what they cost together. It abstains if fewer than half of all have a score.

    Args:
        verdicts: of the samples of one judge, or of several judges.
        num_samples: how many there would be if none had failed.
        combine: the scores.
        of: what each is, for the reason of an abstention.
    """
    if num_samples == 1:
        return verdicts[0]
    costs = [verdict.cost_usd for verdict in verdicts if verdict.cost_usd is not None]
    total = Verdict(
        score=None,
        rationale="",
        billed=any(not verdict.is_refunded and verdict.billed for verdict in verdicts),
        is_readable=any(verdict.is_readable for verdict in verdicts),
        failure=next((verdict.failure for verdict in verdicts if verdict.failure is not None), None),
        cost_usd=sum(costs) if costs else None,
        input_tokens=sum(verdict.input_tokens for verdict in verdicts),
        output_tokens=sum(verdict.output_tokens for verdict in verdicts),
    )
    scored = [(verdict.score, verdict.rationale) for verdict in verdicts if verdict.score is not None]
    if 2 * len(scored) < num_samples:
        reasons = [verdict.rationale for verdict in verdicts if verdict.score is None]
        rationale = f"{len(scored)} of {len(verdicts)} {of} have a score, of {num_samples}; {reasons[-1]}"
        return replace(total, rationale=rationale)
    score, rationale, disagreement = joined(scored, combine)
    return replace(total, score=score, rationale=rationale, disagreement=disagreement)


def joined(scored: Sequence[tuple[float, str]], combine: Combine) -> tuple[float, str, float | None]:
    """Join several (score, rationale) to one: also how far the scores differ, None of a single one."""
    scores = [score for score, _ in scored]
    score = combine(scores)
    # The reasons of the answer that is nearest to what came of all.
    rationale = min(scored, key=lambda each: abs(each[0] - score))[1]
    return score, rationale, statistics.pstdev(scores) if len(scores) > 1 else None
