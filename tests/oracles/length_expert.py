"""A scripted expert that other processes can import: one point per digit."""


def judge(prompt: str, response: str) -> tuple[float, str]:
    """Count the digits."""
    num_digits = sum(character.isdigit() for character in response)
    return num_digits, f"{num_digits} digits"
