"""Statistics of a study: standard errors over seeds and prompts, paired tests, ranks, and labels needed.

A study measures every strategy with every seed, on prompts that may be the same or others. Values are given as one
dictionary per seed, from a prompt's id to its value.
"""
# scipy has no types: its results are unknown to the type checker.
# pyright: reportMissingTypeStubs=false, reportUnknownVariableType=false, reportUnknownMemberType=false
# pyright: reportUnknownArgumentType=false

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Float64
from scipy.stats import rankdata, t

ByPrompt = Mapping[str, float]
"""Values of one seed, by the prompt's id."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SeedsMean:
    """A mean over seeds, with two standard errors."""

    mean: float
    seed_error: float
    """Standard error over seeds; infinite with one."""
    prompt_error: float
    """Standard error over prompts within the seeds; a prompt that several seeds share is one observation."""
    num_seeds: int
    num_prompts: int
    """Different ones, of all seeds."""


def mean_over_seeds(seeds: Sequence[ByPrompt]) -> SeedsMean:
    """Mean over seeds of the mean over prompts.

    The mean is linear in the values, so that a prompt's contribution is the sum of what it adds to each seed's mean;
    the error over prompts is that of a sum of independent contributions.

    Raises:
        ValueError: a seed has no value.
    """
    if not seeds or not all(seeds):
        raise ValueError("a mean over seeds needs a value of each seed, got none")
    means = [float(np.mean(list(seed.values()))) for seed in seeds]
    contributions: defaultdict[str, float] = defaultdict(float)
    for seed, mean in zip(seeds, means, strict=True):
        for prompt, value in seed.items():
            contributions[prompt] += (value - mean) / (len(seed) * len(seeds))
    num = len(contributions)
    squares = sum(contribution**2 for contribution in contributions.values())
    return SeedsMean(
        mean=float(np.mean(means)),
        seed_error=float(np.std(means, ddof=1)) / math.sqrt(len(means)) if len(means) > 1 else math.inf,
        prompt_error=math.sqrt(squares * num / (num - 1)) if num > 1 else math.inf,
        num_seeds=len(means),
        num_prompts=num,
    )


def paired_by_prompt(ours: ByPrompt, theirs: ByPrompt) -> dict[str, float]:
    """Difference ours - theirs on every prompt that both have."""
    return {prompt: value - theirs[prompt] for prompt, value in ours.items() if prompt in theirs}


def t_test(mean: float, error: float, num: int) -> float:
    """Two-sided p-value of a mean of 0, of `num` observations with this standard error; 1 for a single observation."""
    if num < 2 or math.isinf(error):
        return 1.0
    if error == 0:
        return 1.0 if mean == 0 else 0.0
    return float(2 * t.sf(abs(mean) / error, num - 1))


def paired_test(difference: SeedsMean) -> float:
    """p-value of no difference: the larger one of the t-tests over seeds and over prompts.

    A difference counts where it would come again with other seeds and with other prompts (an intersection-union test).
    """
    over_seeds = t_test(difference.mean, difference.seed_error, difference.num_seeds)
    over_prompts = t_test(difference.mean, difference.prompt_error, difference.num_prompts)
    return max(over_seeds, over_prompts)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's adjusted p-values: at most alpha for as many as may be rejected together at level alpha.

    The i-th smallest of m is multiplied by m - i + 1, made no smaller than the one before it, and at most 1.
    """
    adjusted = [1.0] * len(p_values)
    largest = 0.0
    for place, i in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        largest = max(largest, min(1.0, (len(p_values) - place) * p_values[i]))
        adjusted[i] = largest
    return adjusted


def mean_ranks(values: Float[np.ndarray, "blocks arms"], *, is_loss: bool = False) -> Float64[np.ndarray, " arms"]:
    """Mean rank of each arm over blocks (a seed at a budget): 1 is best, ties share the mean of their ranks.

    Blocks that lack a value (NaN) are left out; NaN if none is left.
    """
    whole = values[~np.isnan(values).any(1)]
    if not len(whole):
        return np.full(values.shape[1], np.nan)
    return rankdata(whole if is_loss else -whole, axis=1).mean(0)


def labels_needed(labels: Sequence[float], gains: Sequence[float], target: float) -> float:
    """Labels at which a curve of gains reaches a target; infinite if it does not.

    The curve is made non-decreasing by isotonic regression, starts at no labels with no gain, and is linear between its
    points.

    Args:
        labels: ascending, above 0.
        gains: at those numbers of labels.
        target: above 0.
    """
    x = np.concatenate([[0.0], labels])
    y = np.concatenate([[0.0], np.maximum(isotonic(gains), 0.0)])
    reached = np.flatnonzero(y >= target)
    if not len(reached):
        return math.inf
    end = int(reached[0])
    rise = y[end] - y[end - 1]
    return float(x[end - 1] + (x[end] - x[end - 1]) * (target - y[end - 1]) / rise)


def isotonic(values: Sequence[float]) -> Float64[np.ndarray, " n"]:
    """Non-decreasing values with the least squared distance to the given ones (pool adjacent violators)."""
    pools: list[tuple[float, int]] = []  # mean, number of values
    for value in values:
        mean, num = float(value), 1
        while pools and pools[-1][0] > mean:
            before, num_before = pools.pop()
            mean, num = (before * num_before + mean * num) / (num_before + num), num_before + num
        pools.append((mean, num))
    return np.concatenate([np.full(num, mean) for mean, num in pools]) if pools else np.empty(0)


def bootstrap_means(
    seeds: Sequence[Float[np.ndarray, "prompts points"]],
    prompts: Sequence[Sequence[str]],
    num_resamples: int,
    *,
    seed: int = 0,
) -> Float64[np.ndarray, "num_resamples points"]:
    """Means over seeds and prompts of resampled data: seeds are drawn, and prompts of all that any seed has.

    A prompt is drawn for all seeds that have it, and all of its points together, so that resampled curves may be
    compared with each other. Of a single seed the prompts alone are drawn.

    Resamples of few seeds are too near to each other: their variance is (S - 1) / S of an unbiased one, and their tails
    are those of a normal distribution where the mean of S seeds has a t-distribution. What a seed's weight differs from
    1 by is therefore multiplied by sqrt(S / (S - 1)) t(0.975, S - 1) / 1.96, as in the expanded percentile interval of
    Hesterberg, "What Teachers Should Know About the Bootstrap" (2015): 9.2 with two seeds, 1.6 with five. A weight may
    be negative.

    Args:
        seeds: values of each seed.
        prompts: ids of their rows.
        num_resamples: number of means.
        seed: draws them.
    """
    rng = np.random.default_rng(seed)
    place = {prompt: number for number, prompt in enumerate(sorted(set().union(*prompts)))}
    drawn = rng.multinomial(len(place), np.full(len(place), 1 / len(place)), size=num_resamples)
    counts = rng.multinomial(len(seeds), np.full(len(seeds), 1 / len(seeds)), size=num_resamples)
    seed_weights = 1 + (counts - 1) * _widening(len(seeds))
    means = np.zeros((num_resamples, seeds[0].shape[1]))
    for number, (values, ids) in enumerate(zip(seeds, prompts, strict=True)):
        weights = drawn[:, [place[prompt] for prompt in ids]].astype(np.float64)
        weights[weights.sum(1) == 0] = 1.0  # none of a seed's few prompts was drawn: as they are
        weights /= weights.sum(1, keepdims=True)
        means += seed_weights[:, number, None] / len(seeds) * (weights @ values)
    return means


def _widening(num_seeds: int) -> float:
    """Factor by which a 95% interval of resampled seeds has to be wider."""
    if num_seeds == 1:
        return 1.0
    return math.sqrt(num_seeds / (num_seeds - 1)) * float(t.ppf(0.975, num_seeds - 1)) / 1.96


def interval(values: Float[np.ndarray, " n"], level: float = 0.95) -> tuple[float, float]:
    """Central interval of resampled values, infinite ones included; NaN of no values.

    Both ends are resampled values, since nothing lies between a number and infinity. A value that is not defined (NaN)
    may be anything: it counts as -inf at the low end, and as inf at the high one.
    """
    if not len(values):
        return math.nan, math.nan
    is_undefined = np.isnan(values)
    lows, highs = (np.sort(np.where(is_undefined, end, values)) for end in (-np.inf, np.inf))
    beyond = int(round((1 - level) / 2 * (len(values) - 1), 9))  # rounded: 0.05 of 100 is 5
    return float(lows[beyond]), float(highs[len(values) - 1 - beyond])
