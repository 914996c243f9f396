"""Two orders of one pair: only what both say is a preference."""

import pytest

from rayrl.algorithms.comparisons import (
    TURNED,
    agreed,
    num_disjoint,
    num_pairs_asked,
    queries_per_pair,
    queries_per_prompt,
)


@pytest.mark.parametrize(
    ("asked", "turned", "together"),
    [
        ("first", "second", "first"),
        ("second", "first", "second"),
        ("tie", "tie", "tie"),
        ("first", "first", "tie"),  # whatever stands first wins: the position decided
        ("second", "second", "tie"),
        ("first", "tie", "tie"),
        ("tie", "second", "tie"),
        (None, "second", None),
        ("first", None, None),
        ("tie", None, None),
        (None, None, None),
    ],
)
def test_what_both_orders_say(asked, turned, together):
    assert agreed(asked, turned) == together
    assert agreed(turned, asked) == (together and TURNED[together])  # the same for the pair in the other order


@pytest.mark.parametrize(("order", "each"), [("both", 2), ("random", 1)])
def test_what_a_budget_pays_for(order, each):
    assert queries_per_pair(order) == each
    assert num_pairs_asked(9, order, 100) == 9 // each
    assert num_pairs_asked(1000, order, 100) == 100
    assert num_pairs_asked(0, order, 100) == 0


@pytest.mark.parametrize(("num_responses", "most", "there"), [(0, 1, 0), (1, 1, 0), (2, 1, 1), (5, 1, 1), (5, 3, 2)])
def test_no_response_is_in_two_pairs(num_responses, most, there):
    assert num_disjoint(num_responses, most) == there


@pytest.mark.parametrize(("competes_by", "expected"), [(None, 3), ("scores", 4), ("random", 6), ("both", 9)])
def test_references_are_scored_once_or_compared_with_every_policy(competes_by, expected):
    assert queries_per_prompt(3, competes_by) == expected
