"""How one budget is spread over rounds."""


def round_share(budget: int, spent: int, num_rounds_left: int) -> int:
    """What a round may spend: an even share of what is left, rounded up. What a round leaves over goes to later ones.

    Args:
        budget: of all rounds.
        spent: by the rounds before this one.
        num_rounds_left: this one included.
    """
    return -(-max(0, budget - spent) // num_rounds_left)


def planned_spending(budget: int, num_rounds: int, most: int, unit: int = 1) -> tuple[int, ...]:
    """What each round spends if every query is answered.

    Args:
        budget: of all rounds.
        num_rounds: at least 1.
        most: what one round can ask at all.
        unit: queries that are asked together or not at all.
    """
    spent: list[int] = []
    for number in range(num_rounds):
        share = round_share(budget, sum(spent), num_rounds - number)
        spent.append(min(share, most) // unit * unit)
    return tuple(spent)
