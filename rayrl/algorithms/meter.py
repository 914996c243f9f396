"""Label meter: what the paid labels have taught, and what more of them would.

From the learning curve of the labels so far (`rayrl.algorithms.learning_curve`) and the curves that fit it
(`rayrl.algorithms.curve_families`): what is reachable, how many labels 80, 90 and 95% of it take, and what the next 100
labels would buy. Every answer has a 90% interval. Where the labels do not tell, the answer is not known yet, and the
interval still has what is sure: at least so many labels, at most so much more agreement.

Chance orders half of the pairs as the oracle does. "80% of what is reachable" is 80% of the way from 0.5 to the
asymptote. Labels stand for labels like those that were paid, chosen in the same way.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Bool, Float, Float64, Int64

from rayrl.algorithms.curve_families import CurveFit, Curves, fit_curves
from rayrl.algorithms.heads import NUM_HEADS
from rayrl.algorithms.learning_curve import (
    MIN_LABELS,
    MIN_PROMPTS,
    NUM_SPLITS,
    LearningCurve,
    learning_curve,
    pair_learning_curve,
)

CHANCE = 0.5
SHARES = (0.8, 0.9, 0.95)
"""Of what is reachable above chance."""
NUM_NEXT = 100
REACHABLE_FACTOR = 2.0
"""What is reachable above chance is known if the ends of its interval differ by this factor at most."""
LABELS_FACTOR = 10.0
"""Numbers of labels are known if the ends of their interval differ by this factor at most."""
DRAWN_BEYOND = 4.0
"""The band is drawn up to so many times the labels."""
NUM_DRAWN = 33


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """An answer of the meter, with its 90% interval."""

    value: float
    """By the best curve."""
    low: float
    high: float
    """Infinite where no number of labels is surely enough."""
    is_known: bool
    """Whether the labels tell; otherwise the value means nothing, and the interval is what is sure."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """Agreement that was measured at one number of labels."""

    num_labels: int
    agreement: float
    standard_error: float
    """Of the mean over splits, with all that splits have in common."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BandPoint:
    """The curve at one number of labels."""

    num_labels: float
    agreement: float
    low: float
    """The expected agreement lies between here and `high`, with 90% confidence."""
    high: float
    new_low: float
    """A new measurement, on as many held-out prompts as those so far, lies between here and `new_high`."""
    new_high: float


@dataclass(frozen=True, slots=True, kw_only=True)
class LabelMeter:
    """What the labels so far tell. Plain values: a report keeps it as it is."""

    compares: bool
    """Labels are comparisons; otherwise they are judgements."""
    num_labels: int
    num_prompts: int
    num_held_out: float = 0.0
    """Prompts that each measurement holds out."""
    num_splits: int = 0
    family: str | None = None
    """The curve's; None where the labels are too few for any curve, and nothing below is known."""
    measured: list[Measured] = field(default_factory=list)
    band: list[BandPoint] = field(default_factory=list)
    agreement: Answer | None = None
    """Expected at all labels so far."""
    reachable: Answer | None = None
    """The asymptote: the agreement of any number of labels."""
    share_reached: Answer | None = None
    """Share of what is reachable above chance that the labels so far have reached."""
    labels_for: dict[str, Answer] = field(default_factory=dict)
    """Labels that shares of what is reachable above chance take, by the share: "0.8"."""
    next_gain: Answer | None = None
    """Agreement that the next `NUM_NEXT` labels add."""


def judgement_meter(
    vectors: Float[np.ndarray, "n d"],
    scores: Float[np.ndarray, " n"],
    groups: Int64[np.ndarray, " n"],
    *,
    num_splits: int = NUM_SPLITS,
    num_heads: int = NUM_HEADS,
    seed: int = 0,
) -> LabelMeter:
    """Read the meter on judgements; the arguments are those of `learning_curve`."""
    curve = learning_curve(vectors, scores, groups, num_splits=num_splits, num_heads=num_heads, seed=seed)
    return read_meter(curve, groups, compares=False)


def comparison_meter(
    differences: Float[np.ndarray, "n d"],
    first_wins: Bool[np.ndarray, " n"],
    groups: Int64[np.ndarray, " n"],
    *,
    num_splits: int = NUM_SPLITS,
    num_heads: int = NUM_HEADS,
    seed: int = 0,
) -> LabelMeter:
    """Read the meter on comparisons that are no ties; the arguments are those of `pair_learning_curve`."""
    curve = pair_learning_curve(
        differences, first_wins, groups, num_splits=num_splits, num_heads=num_heads, seed=seed
    )
    return read_meter(curve, groups, compares=True)


def read_meter(curve: LearningCurve | None, groups: Int64[np.ndarray, " n"], *, compares: bool) -> LabelMeter:
    """Draw all answers from a learning curve; from none, that nothing is known."""
    num_labels, num_prompts = len(groups), len(np.unique(groups))
    if curve is None:
        return LabelMeter(compares=compares, num_labels=num_labels, num_prompts=num_prompts)
    fit = fit_curves(curve.sizes, curve.mean, curve.covariance)
    reachable = _reachable(fit, curve)
    return LabelMeter(
        compares=compares,
        num_labels=num_labels,
        num_prompts=num_prompts,
        num_held_out=curve.num_held_out,
        num_splits=len(curve.agreement),
        family=fit.family,
        measured=_measured(curve),
        band=_band(fit, curve),
        agreement=_answer(fit.best.at(num_labels), fit.possible.at(num_labels), is_known=True),
        reachable=reachable,
        share_reached=_share_reached(fit, num_labels),
        labels_for={f"{share:g}": _labels_for(fit, share, reachable.is_known) for share in SHARES},
        next_gain=_next_gain(fit, num_labels, rises=_rises(fit, curve)),
    )


def stops(meter: LabelMeter, stop_at: float | None) -> bool:
    """Return whether no more labels are to be bought: surely, this share of what is reachable above chance is reached.

    Args:
        meter: of the labels so far.
        stop_at: the share, `select.stop_at`; None never stops.
    """
    return stop_at is not None and meter.share_reached is not None and meter.share_reached.low >= stop_at
