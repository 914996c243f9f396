"""Scripted oracles that other processes can import: one point per digit, and the longer of two responses."""


def judge(prompt: str, response: str) -> tuple[float, str]:
    """Count the digits."""
    num_digits = sum(character.isdigit() for character in response)
    return num_digits, f"{num_digits} digits"


def longer(prompt: str, first: str, second: str) -> str:
    """Prefer length."""
    if len(first) == len(second):
        return "tie"
    return "first" if len(first) > len(second) else "second"


def whatever_comes_first(prompt: str, first: str, second: str) -> str:
    """Prefer a position."""
    return "first"


def reward(prompt: str, response: str) -> float | None:
    """Return the length in hundreds of characters; abstain on an empty response."""
    return len(response) / 100 if response else None
