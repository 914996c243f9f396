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
