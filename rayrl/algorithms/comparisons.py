"""From an expert's comparisons to preferences: what a pair costs, and what its answers say together."""

from typing import Literal

from rayrl.records import Preference

Order = Literal["both", "random"]

TURNED: dict[Preference, Preference] = {"first": "second", "second": "first", "tie": "tie"}
"""A preference, said of the same two responses in the other order."""


def queries_per_pair(order: Order) -> int:
    """Paid comparisons that one pair of responses takes."""
    return 2 if order == "both" else 1


def queries_per_prompt(num_policies: int, competes_by: Order | Literal["scores"] | None) -> int:
    """Paid queries that an evaluation takes at most per prompt: a score of every policy's answer, and its references.

    Args:
        num_policies: each answers once.
        competes_by: a reference answer is compared with every policy's, or scored itself; None if there is none.
    """
    if competes_by is None:
        return num_policies
    return num_policies + (1 if competes_by == "scores" else num_policies * queries_per_pair(competes_by))


def num_pairs_asked(budget: int, order: Order, num_pairs: int) -> int:
    """Pairs that a budget of comparisons pays for, of those there are."""
    return min(budget // queries_per_pair(order), num_pairs)


def num_disjoint(num_responses: int, pairs_per_prompt: int) -> int:
    """Pairs of one prompt's responses, no response in two of them."""
    return min(num_responses // 2, pairs_per_prompt)


def agreed(asked: Preference | None, turned: Preference | None) -> Preference | None:
    """What two answers about the same pair say together, in the order of the first of them (arXiv 2306.05685, 3.4).

    Args:
        asked: the answer about (a, b).
        turned: the answer about (b, a).

    Returns:
        What both say; "tie" where they disagree, since the position decided; None if either abstained.
    """
    if asked is None or turned is None:
        return None
    return asked if asked == TURNED[turned] else "tie"
