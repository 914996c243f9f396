"""The stories expert: VADER's sentiment (Hutto and Gilbert, 2014) of a continuation. Knows mood, not fluency."""

from functools import cache

from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer


@cache
def analyzer() -> SentimentIntensityAnalyzer:
    return SentimentIntensityAnalyzer()  # reads its lexicon once per process


def judge(prompt: str, response: str) -> tuple[float, str]:
    """Compound sentiment of the continuation alone, from [-1, 1] to [0, 5]."""
    compound = analyzer().polarity_scores(response)["compound"]
    return 2.5 * (1 + compound), f"compound sentiment {compound:+.2f}"


def compare(prompt: str, first: str, second: str) -> str:
    """Which of two continuations is the happier one."""
    (a, _), (b, _) = judge(prompt, first), judge(prompt, second)
    return "tie" if a == b else "first" if a > b else "second"
