"""Comparisons of two responses: queries that a pair takes, and the preference that its answers agree on."""

from typing import Literal

from rayrl.records import Preference

Order = Literal["both", "random"]

TURNED: dict[Preference, Preference] = {"first": "second", "second": "first", "tie": "tie"}
"""The same preference where the two responses are in the other order."""


def queries_per_pair(order: Order) -> int:
    """Count the paid comparisons that one pair of responses takes."""
    return 2 if order == "both" else 1


def queries_per_prompt(num_policies: int, competes_by: Order | Literal["scores"] | None) -> int:
    """Count the paid queries that an evaluation takes at most per prompt.

    Every policy's response is scored. The reference is scored once too, or compared with every policy's response.

    Args:
        num_policies: each responds once.
        competes_by: "scores" if the reference is scored, else the order of the comparisons; None without references.
    """
    if competes_by is None:
        return num_policies
    if competes_by == "scores":
        return num_policies + 1
    return num_policies + num_policies * queries_per_pair(competes_by)


def num_pairs_asked(budget: int, order: Order, num_pairs: int) -> int:
    """Count the pairs that are asked about: all of `num_pairs`, or as many as the budget of comparisons pays for."""
    return min(budget // queries_per_pair(order), num_pairs)


def num_disjoint(num_responses: int, pairs_per_prompt: int) -> int:
    """Count the pairs that are made of one prompt's responses, no response in two of them."""
    return min(num_responses // 2, pairs_per_prompt)


def agreed(asked: Preference | None, turned: Preference | None) -> Preference | None:
    """Combine the answers to both orders of a pair into one preference (arXiv 2306.05685, 3.4).

    Args:
        asked: the answer about (a, b).
        turned: the answer about (b, a).

    Returns:
        The preference of both, in the order (a, b); "tie" where they disagree, since then the position decided; None if
        either abstained.
    """
    if asked is None or turned is None:
        return None
    return asked if asked == TURNED[turned] else "tie"
