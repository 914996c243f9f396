"""Pairs of responses put to the oracle, each in its drawn order or in both, and the verdicts on the pairs.

Judges favour a position. Which response is read first is therefore drawn, or both orders are asked about and only what
both say is a preference (arXiv 2306.05685, 3.4).
"""

from collections import Counter
from collections.abc import Sequence

from ray.actor import ActorHandle

from rayrl.algorithms.comparisons import TURNED, Order, agreed, queries_per_pair
from rayrl.records import Comparison, Preference, content_id
from rayrl.runs.stage_metrics import ComparisonCounts
from rayrl.runs.stage_table import AnyStage
from rayrl.stages.labelling.ask import abstention_reasons, ask_comparisons

Side = tuple[str, str]
"""Id and text of one response of a pair."""


def drawn(seed: int, response_id: str) -> str:
    """Key that sorts the responses to a prompt into a random order, a function of the seed."""
    return content_id("pair", str(seed), response_id)


def in_drawn_order(seed: int, *sides: Side) -> list[Side]:
    """Draw which response is read first."""
    return sorted(sides, key=lambda side: drawn(seed, side[0]))


def pair_question(prompt_id: str, prompt: str, sides: Sequence[Side]) -> Comparison:
    """Put two responses to a prompt as a question, in their order."""
    (first_id, first), (second_id, second) = sides
    return Comparison(
        prompt_id=prompt_id, first_id=first_id, second_id=second_id, prompt=prompt, first=first, second=second
    )


def ask_about(
    oracle: ActorHandle, pairs: Sequence[Comparison], order: Order, stage: AnyStage, *, describe: str
) -> tuple[list[Comparison], list[Preference | None]]:
    """Have the oracle compare pairs of responses.

    Args:
        oracle: the pool.
        pairs: in their drawn order, of the status "asked".
        order: "both" asks about the other order too.
        stage: asks; the table says which budget pays.
        describe: title of the progress bar.

    Returns:
        The answers to all questions, one or two per pair, and the verdict on each pair; None where it is undecided.
    """
    asked: list[Comparison] = []
    for pair in pairs:
        asked += questions(pair, order)
    answers = ask_comparisons(oracle, asked, stage, describe=describe)
    size = queries_per_pair(order)
    verdicts: list[Preference | None] = [
        verdict(answers[start : start + size]) for start in range(0, len(answers), size)
    ]
    return answers, verdicts


def questions(pair: Comparison, order: Order) -> list[Comparison]:
    """List the questions about a pair: its drawn order, and with "both" the other one after it."""
    return [pair, pair.turned()] if order == "both" else [pair]


def verdict(answers: Sequence[Comparison]) -> Preference | None:
    """Decide a pair by the answers to its `questions`; None if one of them abstained."""
    if len(answers) == 1:
        return answers[0].preference
    drawn_order, other_order = answers
    return agreed(drawn_order.preference, other_order.preference)


def count_answers(
    answers: Sequence[Comparison], verdicts: Sequence[Preference | None], order: Order
) -> ComparisonCounts:
    """Count ties, abstentions with their reasons, disagreements of the two orders, and wins of the first position."""
    preferences = Counter(answer.preference for answer in answers)
    num_decided = preferences["first"] + preferences["second"]
    num_disagreements = 0
    if order == "both":
        for drawn_order, other_order in zip(answers[::2], answers[1::2], strict=True):
            if drawn_order.preference is not None and other_order.preference is not None:
                num_disagreements += drawn_order.preference != TURNED[other_order.preference]
    return ComparisonCounts(
        num_ties=verdicts.count("tie"),
        num_abstained=verdicts.count(None),
        num_disagreements=num_disagreements,
        first_position_share=preferences["first"] / num_decided if num_decided else None,
        abstentions=abstention_reasons([answer.rationale for answer in answers if answer.preference is None]),
    )
