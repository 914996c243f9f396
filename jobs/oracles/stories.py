"""Oracle of the stories runs: VADER's sentiment (Hutto and Gilbert, 2014) of a continuation.

It measures mood and knows nothing of fluency.
"""

from functools import cache

from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer


@cache
def analyzer() -> SentimentIntensityAnalyzer:
    return SentimentIntensityAnalyzer()  # reads its lexicon once per process


def judge(prompt: str, response: str) -> tuple[float, str]:
    """Score the continuation alone: its compound sentiment, scaled from [-1, 1] to [0, 5]."""
    compound = analyzer().polarity_scores(response)["compound"]
    return 2.5 * (1 + compound), f"compound sentiment {compound:+.2f}"


def compare(prompt: str, first: str, second: str) -> str:
    """Name the happier one of two continuations."""
    (a, _), (b, _) = judge(prompt, first), judge(prompt, second)
    return "tie" if a == b else "first" if a > b else "second"
