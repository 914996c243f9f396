"""Pairs of responses put to the expert, each in its drawn order or in both, and what the answers say together."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

from ray.actor import ActorHandle

from rayrl.algorithms.comparisons import TURNED, Order, agreed, queries_per_pair
from rayrl.oracles.pool import PairItem
from rayrl.records import Comparison, Preference, content_id
from rayrl.stages.labelling.query import compare


def drawn(seed: int, response_id: str) -> str:
    """Sorts the responses to a prompt into a random order, a function of the seed."""
    return content_id("pair", str(seed), response_id)


def ask_about(
    oracle: ActorHandle, pairs: Sequence[PairItem], order: Order, purpose: str, *, describe: str
) -> tuple[list[Comparison], list[Preference | None]]:
    """The expert's answers to all questions about the pairs, and its verdict on each; None where it decided nothing."""
    items = [item for pair in pairs for item in questions(pair, order)]
    answers = compare(oracle, items, purpose, describe=describe)
    size = queries_per_pair(order)
    return answers, [verdict(answers[at : at + size]) for at in range(0, len(answers), size)]


def questions(pair: PairItem, order: Order) -> list[PairItem]:
    """What is asked about a pair: its drawn order, and with "both" the other one after it."""
    turned: PairItem = {
        **pair,
        "first_id": pair["second_id"],
        "second_id": pair["first_id"],
        "first": pair["second"],
        "second": pair["first"],
    }
    return [pair, turned] if order == "both" else [pair]


def verdict(answers: Sequence[Comparison]) -> Preference | None:
    """What the answers to `questions` say of the pair; None if they decide nothing because one abstained."""
    asked, *turned = answers
    return agreed(asked.preference, turned[0].preference) if turned else asked.preference


def tally(answers: Sequence[Comparison], verdicts: Sequence[Preference | None], order: Order) -> dict[str, Any]:
    """What became of the questions, with the reasons of abstentions and the share of wins of the first position."""
    said = Counter(answer.preference for answer in answers)
    reasons = Counter(answer.rationale[:80] for answer in answers if answer.preference is None)
    decided = said["first"] + said["second"]
    both = zip(answers[::2], answers[1::2], strict=True) if order == "both" else ()
    return {
        "num_ties": verdicts.count("tie"),
        "num_abstained": verdicts.count(None),
        "num_disagreements": sum(
            b.preference is not None and a.preference not in (None, TURNED[b.preference]) for a, b in both
        ),
        "first_position_share": said["first"] / decided if decided else None,
        "abstentions": dict(reasons.most_common(5)),
    }
