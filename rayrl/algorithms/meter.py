"""Label meter: what the paid labels have taught, and what more of them would.

From the learning curve of the labels so far (`rayrl.algorithms.learning_curve`) and the curves that fit it
(`rayrl.algorithms.curve_families`): what is reachable, how many labels 80, 90 and 95% of it take, and what the next 100
labels would buy. Every answer has a 90% interval. Where the labels do not tell, the answer is not known yet, and the
interval still has what is sure: at least so many labels, at most so much more agreement.

Chance orders half of the pairs as the oracle does. "80% of what is reachable" is 80% of the way from 0.5 to the
asymptote. Labels stand for labels like those that were paid, chosen in the same way.
"""

import math
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Float, Float64, Int64

from rayrl.algorithms.curve_families import CurveFit, Curves, fit_curves
from rayrl.algorithms.learning_curve import (
    MIN_LABELS,
    MIN_PROMPTS,
    NUM_HEADS,
    NUM_SPLITS,
    LabelArray,
    LearningCurve,
    learning_curve,
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
NOT_KNOWN = "not known yet"


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
    """Agreement that the next `NUM_NEXT` labels add. It is known if the curve surely rises."""

    @property
    def unit(self) -> str:
        """Name of one kind of label, in the plural."""
        return "comparisons" if self.compares else "judgements"


def label_meter(
    vectors: Float[np.ndarray, "n d"],
    labels: LabelArray,
    groups: Int64[np.ndarray, " n"],
    *,
    compares: bool = False,
    num_splits: int = NUM_SPLITS,
    num_heads: int = NUM_HEADS,
    seed: int = 0,
) -> LabelMeter:
    """Read the meter on judgements, or on comparisons that are no ties; the arguments are those of `learning_curve`."""
    curve = learning_curve(
        vectors, labels, groups, compares=compares, num_splits=num_splits, num_heads=num_heads, seed=seed
    )
    return read_meter(curve, groups, compares=compares)


def read_meter(curve: LearningCurve | None, groups: Int64[np.ndarray, " n"], *, compares: bool) -> LabelMeter:
    """Draw all answers from a learning curve; from none, that nothing is known."""
    num_labels, num_prompts = len(groups), len(np.unique(groups))
    if curve is None:
        return LabelMeter(compares=compares, num_labels=num_labels, num_prompts=num_prompts)
    fit = fit_curves(curve.sizes, curve.mean, curve.covariance)
    reachable, rises = _reachable(fit), _rises(fit, curve)
    first_size = int(curve.sizes[0])
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
        share_reached=_share_reached(fit, num_labels, is_known=reachable.is_known),
        labels_for={
            f"{share:g}": _labels_for(fit, share, first_size, is_known=reachable.is_known and rises) for share in SHARES
        },
        next_gain=_next_gain(fit, num_labels, is_known=rises),
    )


def stops(meter: LabelMeter, stop_at: float | None) -> bool:
    """Return whether no more labels are to be bought: surely, this share of what is reachable above chance is reached.

    Args:
        meter: of the labels so far.
        stop_at: the share, `select.stop_at`; None never stops.
    """
    return stop_at is not None and meter.share_reached is not None and meter.share_reached.low >= stop_at


def describe(meter: LabelMeter) -> str:
    """Write the meter as one line of a log."""
    labels = f"meter: {meter.num_labels:,} {meter.unit}"
    if meter.agreement is None or meter.share_reached is None or meter.next_gain is None:
        return f"{labels}; {NOT_KNOWN}: {too_few(meter)}"
    agreement, share = value_text(meter.agreement, ".3f"), value_text(meter.share_reached, ".0%")
    reached = f"agreement {agreement}; {share} of what is reachable"
    needed = f"95% takes {labels_text(meter.labels_for['0.95'])}"
    return f"{labels}, {reached}; {needed}; the next {NUM_NEXT} buy {gain_text(meter.next_gain)}"


def too_few(meter: LabelMeter) -> str:
    """Say why there is no curve."""
    if meter.num_labels >= MIN_LABELS and meter.num_prompts >= MIN_PROMPTS:
        return f"the {meter.num_labels:,} {meter.unit} are all alike"
    return (
        f"a curve takes {MIN_LABELS} {meter.unit} of {MIN_PROMPTS} prompts, and there are {meter.num_labels:,} of "
        f"{meter.num_prompts:,}"
    )


def value_text(answer: Answer, pattern: str) -> str:
    """Write a value with its interval; of what is not known only that."""
    if not answer.is_known:
        return NOT_KNOWN
    return f"{answer.value:{pattern}} ({answer.low:{pattern}} to {answer.high:{pattern}})"


def gain_text(answer: Answer) -> str:
    """Write a gain with its interval; of one that is not known, its upper end."""
    return value_text(answer, "+.3f") if answer.is_known else f"{NOT_KNOWN}, at most {answer.high:+.3f}"


def labels_text(answer: Answer) -> str:
    """Write a number of labels with its interval, in two digits; of one that is not known, its lower end."""
    if answer.is_known:
        return f"{_two_digits(answer.value)} ({_two_digits(answer.low)} to {_two_digits(answer.high)})"
    return f"{NOT_KNOWN}, at least {_two_digits(answer.low)}" if answer.low > 0 else NOT_KNOWN


def _two_digits(number: float) -> str:
    digits = max(0, math.floor(math.log10(number)) - 1) if number > 0 else 0
    return f"{round(number, -digits):,.0f}"


def _measured(curve: LearningCurve) -> list[Measured]:
    return [
        Measured(num_labels=int(size), agreement=float(agreement), standard_error=math.sqrt(variance))
        for size, agreement, variance in zip(curve.sizes, curve.mean, np.diag(curve.covariance), strict=True)
    ]


def _band(fit: CurveFit, curve: LearningCurve) -> list[BandPoint]:
    points: list[BandPoint] = []
    first, longest = float(curve.sizes[0]), DRAWN_BEYOND * curve.num_labels
    for step in range(NUM_DRAWN):
        size = first * (longest / first) ** (step / (NUM_DRAWN - 1))
        low, high = fit.band(size)
        new_low, new_high = fit.band_of_measurement(size, curve.noise(size, curve.num_held_out))
        agreement = float(fit.best.at(size)[0])
        points.append(
            BandPoint(num_labels=size, agreement=agreement, low=low, high=high, new_low=new_low, new_high=new_high)
        )
    return points


def _rises(fit: CurveFit, curve: LearningCurve) -> bool:
    """Return whether every possible curve rises over the measured sizes."""
    rise = fit.possible.at(float(curve.sizes[-1])) - fit.possible.at(float(curve.sizes[0]))
    return bool(rise.min() > 0)


def _reachable(fit: CurveFit) -> Answer:
    low, high = fit.possible.asymptote.min() - CHANCE, fit.possible.asymptote.max() - CHANCE
    return _answer(
        fit.best.asymptote, fit.possible.asymptote, is_known=bool(low > 0 and high <= REACHABLE_FACTOR * low)
    )


def _share_reached(fit: CurveFit, num_labels: int, *, is_known: bool) -> Answer:
    def share(curves: Curves) -> Float64[np.ndarray, " curves"]:
        reachable = curves.asymptote - CHANCE
        # Where nothing is reachable, nothing is reached.
        of_reachable = np.divide(
            curves.at(num_labels) - CHANCE, reachable, out=np.zeros(len(reachable)), where=reachable > 0
        )
        return np.clip(of_reachable, 0.0, 1.0)

    return _answer(share(fit.best), share(fit.possible), is_known=is_known)


def _labels_for(fit: CurveFit, share: float, first_size: int, *, is_known: bool) -> Answer:
    def labels(curves: Curves) -> Float64[np.ndarray, " curves"]:
        found = curves.labels_for(CHANCE + share * (curves.asymptote - CHANCE))
        return np.where(curves.asymptote > CHANCE, found, np.inf)

    of_possible = labels(fit.possible)
    # Below the first size nothing was measured.
    is_near = bool(of_possible.max() <= LABELS_FACTOR * max(of_possible.min(), first_size))
    return _answer(labels(fit.best), of_possible, is_known=is_known and is_near)


def _next_gain(fit: CurveFit, num_labels: int, *, is_known: bool) -> Answer:
    def gain(curves: Curves) -> Float64[np.ndarray, " curves"]:
        return curves.at(num_labels + NUM_NEXT) - curves.at(num_labels)

    return _answer(gain(fit.best), gain(fit.possible), is_known=is_known)


def _answer(best: Float64[np.ndarray, " one"], possible: Float64[np.ndarray, " curves"], *, is_known: bool) -> Answer:
    return Answer(value=float(best[0]), low=float(possible.min()), high=float(possible.max()), is_known=is_known)
