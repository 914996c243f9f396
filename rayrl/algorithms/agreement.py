"""Agreement of a proxy with the oracle on the responses to one prompt, and what the best of n by the proxy loses.

Each measure is taken within a prompt, so that its mean over prompts has a standard error over prompts. `MEASURES` lists
those against the oracle's scores, `COMPARISON_MEASURES` those against its comparisons.
"""
# scipy has no types: its results are unknown to the type checker.
# pyright: reportMissingTypeStubs=false, reportUnknownVariableType=false, reportUnknownMemberType=false
# pyright: reportUnknownArgumentType=false

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Float64, Int64, Shaped
from scipy.stats import rankdata

ROUNDING = 1e-9
"""Residuals below this share of the predictions' range are rounding."""


def rank_correlation(predicted: Float[np.ndarray, " n"], oracle: Float[np.ndarray, " n"]) -> float:
    """Spearman's rank correlation, ties at their mean rank: 0 for equal predictions, NaN where the oracle ties all."""
    if np.ptp(oracle) == 0:
        return math.nan
    if np.ptp(predicted) == 0:
        return 0.0
    return float(np.corrcoef(rankdata(predicted), rankdata(oracle))[0, 1])


def pair_accuracy(predicted: Float[np.ndarray, " n"], oracle: Float[np.ndarray, " n"]) -> float:
    """Share of the pairs that the oracle orders which the prediction orders alike; a tie of the prediction is half.

    NaN where the oracle ties all.
    """
    oracle_order = np.sign(np.subtract.outer(oracle, oracle))
    predicted_order = np.sign(np.subtract.outer(predicted, predicted))
    ordered = oracle_order > 0  # each pair once
    if not ordered.any():
        return math.nan
    return float((predicted_order[ordered] / 2 + 0.5).mean())


def regret(predicted: Float[np.ndarray, " n"], oracle: Float[np.ndarray, " n"]) -> float:
    """Oracle's score of the best response less that of the response which the prediction puts first.

    Where the prediction puts several first, the mean of theirs counts.
    """
    return float(oracle.max() - oracle[predicted == predicted.max()].mean())


def agreement(differences: Float[np.ndarray, " n"], wins: Float[np.ndarray, " n"]) -> float:
    """Share of the comparisons that the prediction decides as the oracle does; a tie of the prediction is half.

    Args:
        differences: the prediction's score of each first response less that of the second.
        wins: the oracle's answer: 1 where the first response won, 0 where the second did, 0.5 for a tie. Ties order
            nothing, and are left out. NaN of nothing else.
    """
    decided = wins != 0.5
    if not decided.any():
        return math.nan
    return float(np.mean(np.sign(differences[decided]) * np.sign(wins[decided] - 0.5) / 2 + 0.5))


def without_length(predicted: Float[np.ndarray, " n"], lengths: Shaped[np.ndarray, " n"]) -> Float64[np.ndarray, " n"]:
    """Predictions with the part that the responses' length explains taken out.

    The residuals of a linear regression on log(1 + length), over all responses together.
    """
    log_length = np.log1p(np.asarray(lengths, np.float64))
    design = np.stack([np.ones(len(log_length)), log_length], 1)
    predicted = np.asarray(predicted, np.float64)
    residuals = predicted - design @ np.linalg.lstsq(design, predicted, rcond=None)[0]
    # What is left of a prediction that is length alone is rounding, and must order nothing.
    return np.where(np.abs(residuals) > ROUNDING * np.ptp(predicted), residuals, 0.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Measure:
    """A measure of a proxy on the responses to one prompt."""

    title: str
    of_prompt: Callable[[np.ndarray, np.ndarray], float]
    """(predicted, oracle) to its value, of comparisons (differences, wins); NaN where it is undefined, which depends on
    the oracle's answers alone."""
    controls_length: bool = False
    """Whether the prediction is taken `without_length`."""
    is_loss: bool = False
    """Whether smaller is better."""


_PLAIN = {
    "pair_accuracy": Measure(title="pairs ordered as the oracle does", of_prompt=pair_accuracy),
    "rank_correlation": Measure(title="rank correlation within a prompt", of_prompt=rank_correlation),
    "regret": Measure(title="regret of best of n, in the oracle's score", of_prompt=regret, is_loss=True),
}
MEASURES: dict[str, Measure] = {
    **_PLAIN,
    **{
        f"{name}_without_length": Measure(
            title=f"{measure.title}, length regressed out",
            of_prompt=measure.of_prompt,
            controls_length=True,
            is_loss=measure.is_loss,
        )
        for name, measure in _PLAIN.items()
    },
}

_AGREEMENT = "comparisons decided as the oracle does"
COMPARISON_MEASURES: dict[str, Measure] = {
    "agreement": Measure(title=_AGREEMENT, of_prompt=agreement),
    "agreement_without_length": Measure(
        title=f"{_AGREEMENT}, length regressed out", of_prompt=agreement, controls_length=True
    ),
}


def by_prompt(
    measure: Measure,
    predicted: Float[np.ndarray, " n"],
    oracle: Float[np.ndarray, " n"],
    prompts: Int64[np.ndarray, " n"],
    lengths: Shaped[np.ndarray, " n"],
) -> dict[int, float]:
    """Value of a measure for every prompt on which it is defined: with two responses that the oracle scored, or more.

    Args:
        measure: which.
        predicted: the proxy's score of each response.
        oracle: the oracle's; NaN where it abstained.
        prompts: number of each response's prompt.
        lengths: of the responses, in characters.
    """
    scored = ~np.isnan(oracle)
    predicted, oracle, prompts = predicted[scored], oracle[scored], prompts[scored]
    if measure.controls_length:
        predicted = without_length(predicted, lengths[scored])
    return _defined(measure, predicted, oracle, prompts, least=2)


def comparisons_by_prompt(
    measure: Measure,
    predicted: Float[np.ndarray, " n"],
    compared: Int64[np.ndarray, "m 2"],
    wins: Float[np.ndarray, " m"],
    prompts: Int64[np.ndarray, " n"],
    lengths: Shaped[np.ndarray, " n"],
) -> dict[int, float]:
    """Value of a measure of `COMPARISON_MEASURES` for every prompt of which the oracle decided a comparison.

    Args:
        measure: which.
        predicted: the proxy's score of each response.
        compared: rows of the first and the second response of each comparison.
        wins: the oracle's answers (see `agreement`); NaN where it abstained.
        prompts: number of each response's prompt.
        lengths: of the responses, in characters.
    """
    if measure.controls_length:
        predicted = without_length(predicted, lengths)
    answered = ~np.isnan(wins)
    compared, wins = compared[answered], wins[answered]
    differences = predicted[compared[:, 0]] - predicted[compared[:, 1]]
    return _defined(measure, differences, wins, prompts[compared[:, 0]], least=1)


def _defined(
    measure: Measure, predicted: np.ndarray, oracle: np.ndarray, prompts: Int64[np.ndarray, " n"], *, least: int
) -> dict[int, float]:
    """Values of a measure by prompt, of those with `least` rows or more on which it is defined."""
    return {
        number: value
        for number, rows in _rows_by_prompt(prompts)
        if len(rows) >= least and not math.isnan(value := measure.of_prompt(predicted[rows], oracle[rows]))
    }


def _rows_by_prompt(prompts: Int64[np.ndarray, " n"]) -> list[tuple[int, Int64[np.ndarray, " rows"]]]:
    """List the rows of every prompt, by rising number."""
    order = np.argsort(prompts, kind="stable")
    numbers, starts = np.unique(prompts[order], return_index=True)
    return [(int(number), rows) for number, rows in zip(numbers, np.split(order, starts[1:]), strict=True)]
