"""Summary of the oracle's answers in words: for `rayrl status`, and for the last lines of a run."""

from collections.abc import Iterator

from rayrl.report.facts import Paid


def answers(paid: Paid) -> Iterator[str]:
    """Say how many questions were asked, answered and abstained on, and why; nothing of a purpose that asked none."""
    for what, queries in (
        ("label", paid.label),
        ("evaluation", paid.evaluate),
        ("test", paid.test),
        ("people's", paid.people),
    ):
        if not queries.spent:
            continue
        reasons = "; ".join(f"{num} {reason}" for reason, num in queries.abstentions.items())
        yield (
            f"{what} queries: {queries.spent} asked, {queries.scored} answered, {queries.abstained} abstained"
            + (f" ({reasons})" if reasons else "")
            + (f", {queries.lost} lost" if queries.lost else "")
            + (f", {queries.taken_over} more answered from the ledger" if queries.taken_over else "")
        )
