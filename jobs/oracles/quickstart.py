"""Oracle of the quickstart: five yes-or-no questions about an answer, one point each.

Its rule is known, so that a gain can be checked against it.
"""

import re

ASKED = re.compile(r"How (?:do|can) I \w+ (\w+)")


def judge(prompt: str, response: str) -> tuple[float | None, str]:
    """Score an answer from 0 to 5, with the five verdicts as rationale; abstain on a prompt of another kind."""
    asked = ASKED.match(prompt)
    if asked is None:
        return None, "not a question of this oracle's field"
    words = set(re.findall(r"\w+", response.lower()))
    verdicts = {
        "topic": asked[1].lower() in words,
        "step": "first" in words,
        "reason": "because" in words,
        "polite": not words.isdisjoint({"please", "thank", "hope"}),
        "clean": response.rstrip().endswith((".", "!", "?")) and words.isdisjoint({"um", "whatever"}),
    }
    rationale = ", ".join(f"{name} {'yes' if found else 'no'}" for name, found in verdicts.items())
    return float(sum(verdicts.values())), f"{rationale}."


def compare(prompt: str, first: str, second: str) -> str | None:
    """Name the answer that earns more points; abstain where `judge` does."""
    (a, _), (b, _) = judge(prompt, first), judge(prompt, second)
    if a is None or b is None:
        return None
    return "tie" if a == b else "first" if a > b else "second"
