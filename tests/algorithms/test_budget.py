"""One budget over rounds: never more than there is, and nothing is left over that could be asked."""

import pytest

from rayrl.algorithms.budget import planned_spending, round_share


@pytest.mark.parametrize(
    ("budget", "spent", "left", "share"),
    [(24, 0, 1, 24), (24, 0, 2, 12), (25, 0, 2, 13), (25, 13, 1, 12), (10, 4, 3, 2), (7, 7, 2, 0), (7, 9, 1, 0)],
)
def test_a_share_is_an_even_part_of_what_is_left(budget, spent, left, share):
    assert round_share(budget, spent, left) == share


@pytest.mark.parametrize("budget", range(1, 40))
@pytest.mark.parametrize("rounds", [1, 2, 3, 5])
def test_shares_spend_the_budget_evenly_to_the_last(budget, rounds):
    shares = planned_spending(budget, rounds, most=1000)
    assert sum(shares) == budget
    assert max(shares) - min(shares) <= 1 and list(shares) == sorted(shares, reverse=True)


def test_what_a_round_does_not_spend_is_spent_by_later_ones():
    assert round_share(30, 10, 2) == 10
    assert round_share(30, 7, 2) == 12  # three were refunded
    assert planned_spending(30, 3, most=1000, unit=4) == (8, 8, 12)
    assert planned_spending(30, 3, most=6) == (6, 6, 6)
