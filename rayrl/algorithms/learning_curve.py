"""Learning curves: how well heads fitted on more and more of the paid labels agree with the oracle on other prompts.

The measure is the share of pairs that a fit orders as the oracle does: of all pairs of held-out judgements whose scores
differ, or of all held-out comparisons that are no tie; a tie of the fit is half of one. Both kinds of label then have
one scale, from 0.5 by chance to 1, which a rank correlation has not. Pairs are of any two held-out judgements, and not
only of one prompt's: where one response per prompt is asked about, there are no others.

Heads on frozen vectors (`rayrl.algorithms.heads`) stand for the evaluator: they are fitted in a moment. The curve is of
labels like those that were paid: a strategy that asks about hard responses makes the held-out ones hard, too.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Float64, Int64

from rayrl.algorithms.heads import Heads, fit_heads, fit_pair_heads

NUM_SPLITS = 16
NUM_HEADS = 8
"""Of each fit. Only their mean is read here, which takes fewer than their spread does."""
HELD_OUT_SHARE = 0.25
"""Share of the prompts that a split holds out."""
MAX_HELD_OUT_LABELS = 1000
"""A split holds out no more labels, about: they are compared pair by pair."""
MIN_LABELS = 32
"""Fewer labels, or labels of fewer than `MIN_PROMPTS` prompts, make no curve."""
MIN_PROMPTS = 16
MIN_SIZE = 8
"""Fewest labels that heads are fitted on."""
NUM_SIZES = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class LearningCurve:
    """Agreement with the oracle on held-out prompts, by the number of labels that heads were fitted on."""

    sizes: Int64[np.ndarray, " sizes"]
    """Numbers of labels, rising."""
    agreement: Float64[np.ndarray, "splits sizes"]
    """Share of held-out pairs that are ordered as the oracle does. Splits without an ordered pair are left out."""
    covariance: Float64[np.ndarray, "sizes sizes"]
    """Of the errors of `mean`, as an estimate of the expected agreement over all prompts and choices of labels."""
    num_labels: int
    num_prompts: int
    num_held_out: float
    """Prompts that a split holds out, on average."""
    prompt_variance: float
    """Variance of one measurement times its held-out prompts, by the choice of these."""
    label_variance: float
    """Variance of one measurement times its labels, by the choice of these."""

    @property
    def mean(self) -> Float64[np.ndarray, " sizes"]:
        """Mean agreement over the splits."""
        return self.agreement.mean(0)

    def noise(self, num_labels: float, num_held_out: float) -> float:
        """Variance of a new measurement about the curve: heads on other labels, compared on other prompts."""
        return self.prompt_variance / num_held_out + self.label_variance / num_labels


@dataclass(frozen=True, slots=True, kw_only=True)
class PairCounts:
    """Held-out pairs that have an order, and those of them that are ordered as the oracle does."""

    agreed: float
    """A tie of the fit is half of one."""
    ordered: float
    agreed_of_prompt: Float64[np.ndarray, " prompts"]
    """Of the pairs that would go with each prompt."""
    ordered_of_prompt: Float64[np.ndarray, " prompts"]

    @property
    def influence(self) -> Float64[np.ndarray, " prompts"]:
        """Change of the agreement by each prompt, times the number of prompts: the jackknife's pseudo-values."""
        ordered = self.ordered - self.ordered_of_prompt
        # Where one prompt has all pairs, nothing is left without it; its influence is not known.
        left = np.divide(self.agreed - self.agreed_of_prompt, ordered, out=np.zeros_like(ordered), where=ordered > 0)
        changes = np.where(ordered > 0, self.agreed / self.ordered - left, 0.0)
        return (len(ordered) - 1) * (changes - changes.mean())


LabelArray = Float[np.ndarray, " n"] | Bool[np.ndarray, " n"]
"""Scores of judgements, or whether the first response of comparisons won."""
Measure = Callable[[Int64[np.ndarray, " fitted"], Int64[np.ndarray, " held_out"]], PairCounts]
"""Fits heads on some of the labels, given as rows, and compares them on others."""


def learning_curve(
    vectors: Float[np.ndarray, "n d"],
    labels: LabelArray,
    groups: Int64[np.ndarray, " n"],
    *,
    compares: bool = False,
    sizes: Sequence[int] | None = None,
    num_splits: int = NUM_SPLITS,
    num_heads: int = NUM_HEADS,
    seed: int = 0,
) -> LearningCurve | None:
    """Measure the learning curve of judgements, or of comparisons.

    Args:
        vectors: of the judged responses; of comparisons the first response's less the second's.
        labels: the oracle's scores; of comparisons whether the first response won.
        groups: each label's prompt, as a number.
        compares: whether the labels are of comparisons.
        sizes: numbers of labels to fit on; by default a geometric series up to what the splits leave.
        num_splits: repeats, each with other prompts held out and another order of the rest.
        num_heads: of each fit.
        seed: draws splits, orders and heads.

    Returns:
        The curve; None for fewer labels or prompts than a curve takes, and for scores that are all the same.

    Raises:
        ValueError: vectors, labels and groups are not of one length or not finite, or a size is not possible.
    """
    _check(vectors, labels, groups)
    fit, count = (fit_pair_heads, accuracy) if compares else (fit_heads, concordance)

    def measure(fitted: np.ndarray, held_out: np.ndarray) -> PairCounts:
        heads = fit(vectors[fitted], labels[fitted], groups[fitted], num_heads=num_heads, seed=seed)
        return count(_mean_score(heads, vectors[held_out]), labels[held_out], groups[held_out])

    return _measured(measure, groups, sizes, num_splits, seed)


def concordance(
    predicted: Float[np.ndarray, " n"], scores: Float[np.ndarray, " n"], groups: Int64[np.ndarray, " n"]
) -> PairCounts:
    """Compare the order of every two predictions with that of their scores."""
    order = np.sign(np.subtract.outer(scores, scores))
    ordered = np.abs(order)
    agreed = (order * np.sign(np.subtract.outer(predicted, predicted)) + ordered) / 2
    of_prompt = (np.unique(groups)[:, None] == groups).astype(np.float64)  # (prompts, n)

    def of_each_prompt(pairs: Float64[np.ndarray, "n n"]) -> Float64[np.ndarray, " prompts"]:
        # Both orders of a pair are in the matrix. A pair within a prompt is in its rows twice, and counts once.
        touched = of_prompt @ pairs  # (prompts, n)
        return touched.sum(1) - (touched * of_prompt).sum(1) / 2

    return PairCounts(
        agreed=float(agreed.sum() / 2),
        ordered=float(ordered.sum() / 2),
        agreed_of_prompt=of_each_prompt(agreed),
        ordered_of_prompt=of_each_prompt(ordered),
    )


def accuracy(
    margins: Float[np.ndarray, " n"], first_wins: Bool[np.ndarray, " n"], groups: Int64[np.ndarray, " n"]
) -> PairCounts:
    """Compare the signs of predicted margins with the winners."""
    agreed = np.sign(margins) * np.where(first_wins, 0.5, -0.5) + 0.5
    of_prompt = np.unique(groups, return_inverse=True)[1]
    return PairCounts(
        agreed=float(agreed.sum()),
        ordered=float(len(margins)),
        agreed_of_prompt=np.bincount(of_prompt, agreed),
        ordered_of_prompt=np.bincount(of_prompt).astype(np.float64),
    )


def _measured(
    measure: Measure,
    groups: Int64[np.ndarray, " n"],
    sizes: Sequence[int] | None,
    num_splits: int,
    seed: int,
) -> LearningCurve | None:
    prompts, prompt_of = np.unique(groups, return_inverse=True)
    if len(groups) < MIN_LABELS or len(prompts) < MIN_PROMPTS:
        return None
    splits = [_split(prompt_of, np.random.default_rng([seed, number])) for number in range(num_splits)]
    num_left = min(len(fitted) for fitted, _ in splits)
    if sizes is None and num_left < 2 * MIN_SIZE:  # a few prompts have nearly all labels
        return None
    at = _sizes(num_left) if sizes is None else np.array(sizes, np.int64)
    if not len(at) or at.min() < 2 or at.max() > num_left or (np.diff(at) <= 0).any():
        raise ValueError(f"sizes must rise from at least 2 to at most the {num_left} labels left, got {at.tolist()}")
    agreement: list[list[float]] = []
    influences: list[Float64[np.ndarray, "prompts sizes"]] = []
    held_out_prompts: list[Int64[np.ndarray, " prompts"]] = []
    for fitted, held_out in splits:
        distinct = np.unique(prompt_of[held_out])
        if len(distinct) < 2:
            continue
        counts = [measure(fitted[:size], held_out) for size in at]
        if counts[0].ordered:  # it depends on the held-out labels alone
            agreement.append([count.agreed / count.ordered for count in counts])
            influences.append(np.stack([count.influence for count in counts], axis=1))
            held_out_prompts.append(distinct)
    if len(agreement) < 2:
        return None
    return _with_errors(at, np.array(agreement), influences, held_out_prompts, len(groups), len(prompts))


def _with_errors(
    sizes: Int64[np.ndarray, " sizes"],
    agreement: Float64[np.ndarray, "splits sizes"],
    influences: Sequence[Float64[np.ndarray, "prompts sizes"]],
    held_out_prompts: Sequence[Int64[np.ndarray, " prompts"]],
    num_labels: int,
    num_prompts: int,
) -> LearningCurve:
    """Tell how far the mean over splits is off.

    Splits share their prompts, so that their spread says too little. A measurement varies with the prompts that it
    holds out, by what the jackknife finds, and with the labels that it fits on, by the rest. The mean has held out all
    prompts, and fitted on all labels: the first error is that of all prompts together, the second one has at least the
    variance of one fit on all labels and is common to all sizes; the drawing of splits adds its own.
    """
    num_splits = len(agreement)
    num_held_out = np.array([len(prompts) for prompts in held_out_prompts])
    of_prompt = np.zeros((num_prompts, len(sizes)))  # what each prompt, held out, adds to the mean's error
    by_prompts = np.zeros(len(sizes))  # variance of one measurement by its held-out prompts
    for prompts, influence in zip(held_out_prompts, influences, strict=True):
        num = len(prompts)
        of_prompt[prompts] += influence / (num * num_splits)
        by_prompts += (influence**2).sum(0) / (num * (num - 1)) / num_splits
    # Drawn without replacement, held-out prompts and labels vary less from split to split.
    by_labels = agreement.var(0, ddof=1) - by_prompts * (1 - num_held_out.mean() / num_prompts)
    label_variances = by_labels / (1 - sizes / num_labels) * sizes
    label_variance = max(0.0, float(label_variances[len(sizes) // 2 :].mean()))
    drawing = np.cov(agreement, rowvar=False) / num_splits
    # Also where all pairs agree, no size is known better than to half a label.
    least = np.eye(len(sizes)) * (0.5 / num_labels) ** 2
    return LearningCurve(
        sizes=sizes,
        agreement=agreement,
        covariance=of_prompt.T @ of_prompt + drawing + label_variance / num_labels + least,
        num_labels=num_labels,
        num_prompts=num_prompts,
        num_held_out=float(num_held_out.mean()),
        prompt_variance=float(by_prompts[-1] * num_held_out.mean()),
        label_variance=label_variance,
    )


def _split(
    prompt_of: Int64[np.ndarray, " n"], rng: np.random.Generator
) -> tuple[Int64[np.ndarray, " fitted"], Int64[np.ndarray, " held_out"]]:
    """Hold out a share of the prompts; the rows of the rest come prompt by prompt, in a drawn order."""
    place = rng.permutation(prompt_of.max() + 1)[prompt_of]  # of each row's prompt in the drawn order
    rows = np.argsort(place, kind="stable")
    num_prompts = int(HELD_OUT_SHARE * (prompt_of.max() + 1))
    num_held_out = int(np.count_nonzero(place < num_prompts))
    if num_held_out > MAX_HELD_OUT_LABELS:
        num_held_out = int(np.count_nonzero(place < place[rows[MAX_HELD_OUT_LABELS]]))  # whole prompts
    return rows[num_held_out:], rows[:num_held_out]


def _sizes(num_left: int) -> Int64[np.ndarray, " sizes"]:
    """A geometric series: from 16 times fewer than there are, but `MIN_SIZE` at least, up to all of them."""
    return np.unique(np.geomspace(max(MIN_SIZE, num_left / 16), num_left, NUM_SIZES).astype(np.int64))


def _mean_score(heads: Heads, vectors: Float[np.ndarray, "n d"]) -> Float64[np.ndarray, " n"]:
    return heads.scores(vectors).mean(1, dtype=np.float64)


def _check(vectors: np.ndarray, labels: np.ndarray, groups: np.ndarray) -> None:
    if not len(vectors) == len(labels) == len(groups):
        raise ValueError(
            f"vectors, labels and groups must be as many, got {len(vectors)}, {len(labels)} and {len(groups)}"
        )
    if not (np.isfinite(vectors).all() and np.isfinite(labels).all()):
        raise ValueError("vectors and labels must be finite, got NaN or infinity; leave out what has no label")
