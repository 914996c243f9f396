"""Shares of one query budget among the rounds that spend it."""


def round_share(budget: int, spent: int, num_rounds_left: int) -> int:
    """Queries that a round may spend: an even share of the queries left, rounded up.

    Queries that a round does not spend go to the later rounds.

    Args:
        budget: Queries of all rounds together.
        spent: Queries of the rounds before this one.
        num_rounds_left: Rounds that share what is left, this one included.
    """
    left = max(0, budget - spent)
    return -(-left // num_rounds_left)


def planned_spending(budget: int, num_rounds: int, most: int, unit: int = 1) -> tuple[int, ...]:
    """Queries that each round spends if every one of them is answered.

    Args:
        budget: Queries of all rounds together.
        num_rounds: At least 1.
        most: Queries that one round has a question for.
        unit: Queries that are asked together or not at all.
    """
    spent: list[int] = []
    for number in range(num_rounds):
        share = round_share(budget, sum(spent), num_rounds - number)
        affordable = min(share, most)
        spent.append(affordable // unit * unit)
    return tuple(spent)
