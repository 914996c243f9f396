"""Protocol of a desk: a place where questions lie until people answer them, a spreadsheet or a labelling tool.

A question is known there by its key, so that it lies there once however often it is put there. Nothing is ever taken
off a desk: answers stay, and are read again.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, TypeAlias

from rayrl.oracles.protocol import PREFERENCE_SHARES, Named, Verdict
from rayrl.oracles.samples import joined, majority, mean, most_frequent
from rayrl.records import Comparison, Judgement

Kind: TypeAlias = Literal["judgements", "comparisons"]
Combine: TypeAlias = Literal["mean", "majority"]
CANNOT_SAY = "cannot say"
"""Answer of a person who can give none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Annotation:
    """One person's answer to one question."""

    annotator: str
    """Who answered; "" where the desk does not know."""
    score: float | None
    """Of a judgement a number on the rubric's scale, of a comparison one of `PREFERENCE_SHARES`. None: cannot say."""
    rationale: str = ""
    seconds: float | None = None
    """Time spent on the question, where the desk measures it."""


class Desk(Named, Protocol):
    """A place for questions to people. Built from its config and the rubric, as an `Oracle` is."""

    def check(self) -> None:
        """Make sure that questions can be put there and answers read, without putting any.

        Raises:
            ConfigError: they cannot; names the wrong setting and the remedy.
            DataError: an answer that lies there already cannot be read; names its row.
        """
        ...

    def post(self, questions: Sequence[Judgement | Comparison]) -> None:
        """Put questions of one kind there, with their keys; those that lie there already stay as they are.

        Raises:
            DataError: the desk cannot hold one of them.
        """
        ...

    def collect(self, kind: Kind) -> Mapping[str, Sequence[Annotation]]:
        """Read what lies there of one kind: by the key of each question its answers so far, the first ones first.

        A question that is not before as many people as it needs does not lie there.

        Raises:
            DataError: an answer cannot be read; names its row, the rule, what stands there and the remedy.
        """
        ...

    def place(self, kind: Kind) -> str:
        """Say where people answer: files, or the address of a page."""
        ...


def kind_of(question: Judgement | Comparison) -> Kind:
    """Return the kind of a question."""
    return "judgements" if isinstance(question, Judgement) else "comparisons"


def verdict_of(annotations: Sequence[Annotation], kind: Kind, combine: Combine) -> Verdict:
    """Make one verdict of what people say about one question; those who cannot say do not count.

    Args:
        annotations: at least one.
        kind: of the question. Comparisons are decided by the majority, and are a tie without one.
        combine: of judgements: the mean, or the score of more than half (without one, the median).
    """
    scored = [(each.score, each.rationale) for each in annotations if each.score is not None]
    if not scored:
        reasons = "; ".join(each.rationale for each in annotations if each.rationale)
        return Verdict(score=None, rationale=f"{CANNOT_SAY}: {reasons}" if reasons else CANNOT_SAY)
    how = majority if kind == "comparisons" else mean if combine == "mean" else most_frequent
    score, rationale, disagreement = joined(scored, how)
    return Verdict(score=score, rationale=rationale, disagreement=disagreement)


def share_of(word: str) -> float | None:
    """Return the share of a preference's word, "first", "second" or "tie" in any case; None for another word."""
    return {str(preference): share for preference, share in PREFERENCE_SHARES.items()}.get(word.strip().lower())
