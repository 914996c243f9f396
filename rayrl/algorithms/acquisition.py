"""Acquisition of labels in batches: choose by what is known, ask, fit the heads again, and choose the next ones.

This is the loop of active learning. It knows nothing of oracles, money or Ray: `ask` answers.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from jaxtyping import Float, Int64

from rayrl.algorithms.heads import NUM_HEADS, Heads, fit_heads, fit_pair_heads
from rayrl.algorithms.meter import LabelMeter, label_meter
from rayrl.algorithms.routing import held_out_pairs, sure_margin
from rayrl.algorithms.selection.shards import Knowledge, ShardGroup, center_pool, find_vectors, left_of
from rayrl.algorithms.selection.strategies import Strategy

MIN_LABELS = 8
"""Labels below which no heads are fitted, and the strategy of the first batch goes on."""

MAX_SILENT = 3
"""Batches in a row without one answer, after which no more are asked."""
TIE = 0.5
"""Answer to a comparison in which neither response won."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Answers:
    """What came of one batch of questions."""

    scores: Sequence[float | None]
    """One per question. Of a comparison: 1 if the first response won, 0 if the second did, 0.5 for a tie. None: the
    oracle abstained."""
    num_spent: int
    """Questions that were paid for, abstentions among them."""
    unpaid: Sequence[int] = ()
    """Numbers of the questions in the batch that were not answered and cost nothing: another time they may be."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Labels:
    """All that was asked so far, in the order of asking."""

    ids: Int64[np.ndarray, "n u"] = field(default_factory=lambda: np.empty((0, 1), np.int64))
    """Of each question the id of its response, or of its two responses."""
    scores: Float[np.ndarray, " n"] = field(default_factory=lambda: np.empty(0))
    """NaN where the oracle abstained."""

    @property
    def compares(self) -> bool:
        """Return whether the questions are comparisons of two responses."""
        return self.ids.shape[1] == 2

    @property
    def answered(self) -> np.ndarray:
        """Rows that were answered."""
        return np.flatnonzero(~np.isnan(self.scores))

    def with_answers(self, ids: Int64[np.ndarray, "m u"], scores: Sequence[float | None]) -> "Labels":
        """Append one batch."""
        known = self.ids if len(self.ids) else np.empty((0, ids.shape[1]), np.int64)
        answers = np.array([np.nan if score is None else score for score in scores])
        return Labels(ids=np.concatenate([known, ids]), scores=np.concatenate([self.scores, answers]))


@dataclass(frozen=True, slots=True, kw_only=True)
class Acquisition:
    """How labels are chosen."""

    strategy: Strategy
    first: Strategy | None = None
    """Chooses the first batch, and for a strategy that reads the heads until there are `MIN_LABELS` labels."""
    num_batches: int = 1
    """Parts of the budget; the heads are fitted again between them. Where abstentions cost nothing, more follow, which
    ask about the next best in their place."""
    num_heads: int = NUM_HEADS
    """Of the ensemble."""
    confidence: float = 0.9
    """For a strategy that routes: how often the heads must be right where they are sure."""
    knowledge: Knowledge = field(default_factory=Knowledge)
    """Seed, initial centres and sizes."""


def acquire(
    ids: Int64[np.ndarray, " n"],
    shards: ShardGroup | None,
    acquisition: Acquisition,
    num_labels: int,
    ask: Callable[[Int64[np.ndarray, "m u"]], Answers],
    *,
    known: Labels | None = None,
    stop: Callable[[Labels], bool] | None = None,
) -> Labels:
    """Spend `num_labels` on questions, in batches.

    Args:
        ids: what may be asked about.
        shards: the vectors of these; None for strategies that read none.
        acquisition: how the questions are chosen.
        num_labels: questions that may be paid for. All there is, where that is less.
        ask: answers questions about responses (m, 1), or pairs (m, 2).
        known: labels from before, which cost nothing now; of the same ids.
        stop: asked after each batch whether the labels are enough; what is left of the budget is then not spent.

    Returns:
        The labels, `known` ones first.
    """
    strategy, labels = acquisition.strategy, known or Labels()
    num_left, batch, num_silent = num_labels, 0, 0
    while num_left > 0:
        batch += 1
        heads = fit_labels(shards, labels, acquisition) if shards is not None else None
        is_first = len(labels.ids) == 0 or (strategy.reads_heads and heads is None)
        chooser = acquisition.first if is_first and acquisition.first is not None else strategy
        assert heads is not None or not chooser.reads_heads, (
            "refused before: heads, and no strategy for the first batch"
        )
        now = replace(acquisition.knowledge, taken=np.unique(labels.ids), heads=heads)
        if chooser.routes and shards is not None:
            now = replace(now, sure_margin=_sure_margin(shards, labels, acquisition))
        share = -(-num_left // max(1, acquisition.num_batches - batch + 1))
        num_asked = min(share, num_choosable(ids, chooser, now))
        if num_asked == 0:
            break
        picks = chooser.choose(shards if chooser.reads_vectors else ids, num_asked, now).ids
        if not picks:  # the heads are sure of all that is left
            break
        questions = np.array(picks, np.int64).reshape(-1, 2 if chooser.asks == "pairs" else 1)
        answers = ask(questions)
        labels = labels.with_answers(questions, answers.scores)
        num_left -= answers.num_spent
        num_silent = 0 if answers.num_spent else num_silent + 1
        if num_silent == MAX_SILENT:
            break
        if stop is not None and stop(labels):
            break
    return labels


def num_choosable(ids: Int64[np.ndarray, " n"], strategy: Strategy, knowledge: Knowledge) -> int:
    """Count the questions that may still be asked: responses, or prompts with two of them."""
    if strategy.asks == "responses":
        return len(left_of(ids, knowledge.taken))
    prompts, counts = np.unique(ids // knowledge.prompt_stride, return_counts=True)
    return len(left_of(prompts[counts > 1], knowledge.taken // knowledge.prompt_stride))


def fit_labels(shards: ShardGroup, labels: Labels, acquisition: Acquisition) -> Heads | None:
    """Fit the heads on the answered questions; None with fewer than `MIN_LABELS`. Ties teach comparisons nothing."""
    rows = _decided(labels)
    if len(rows) < MIN_LABELS:
        return None
    vectors, scores, groups = _with_vectors(shards, labels, rows, acquisition.knowledge)
    fit = fit_pair_heads if labels.compares else fit_heads
    return fit(vectors, scores, groups, num_heads=acquisition.num_heads, seed=acquisition.knowledge.seed)


def meter_labels(shards: ShardGroup, labels: Labels, knowledge: Knowledge) -> LabelMeter:
    """Read the label meter on the answered questions."""
    vectors, scores, groups = _with_vectors(shards, labels, _decided(labels), knowledge)
    return label_meter(vectors, scores, groups, compares=labels.compares, seed=knowledge.seed)


def _sure_margin(shards: ShardGroup, labels: Labels, acquisition: Acquisition) -> float:
    knowledge = acquisition.knowledge
    vectors, scores, groups = _with_vectors(shards, labels, _decided(labels), knowledge)
    pairs = held_out_pairs(vectors, scores, groups, num_heads=acquisition.num_heads, seed=knowledge.seed)
    return sure_margin(*pairs, acquisition.confidence)


def _decided(labels: Labels) -> Int64[np.ndarray, " n"]:
    """Rows that teach: those that were answered, but for ties of comparisons."""
    rows = labels.answered
    return rows[labels.scores[rows] != TIE] if labels.compares else rows


def _with_vectors(
    shards: ShardGroup, labels: Labels, rows: Int64[np.ndarray, " n"], knowledge: Knowledge
) -> tuple[Float[np.ndarray, "n d"], Float[np.ndarray, " n"], Int64[np.ndarray, " n"]]:
    """Vectors, scores and prompts of some questions; of comparisons differences, and whether the first one won."""
    pool = center_pool(shards)
    ids, scores = labels.ids[rows], labels.scores[rows]
    groups = ids[:, 0] // knowledge.prompt_stride
    if labels.compares:
        both = find_vectors(shards, np.unique(ids))
        first, second = (both[np.searchsorted(np.unique(ids), ids[:, side])] for side in (0, 1))
        return first - second, scores > TIE, groups
    return find_vectors(shards, ids[:, 0]) + pool.offset, scores, groups  # as they were before they were centred
