"""Waits between the attempts at a request: as long as the judge asks for, else exponential backoff with jitter."""

import email.utils
import random
import re
import time
from collections.abc import Mapping

MAX_WAIT_S = 300.0
"""If a judge asks for a longer wait, the question is given up on, unbilled."""

_MAX_BACKOFF_S = 30.0
_FIRST_BACKOFF_S = 0.5
_NUMBER = re.compile(r"[0-9]+(?:\.[0-9]+)?")
_WAIT_IN_WORDS = re.compile(r"\b(?:retry|try again) (?:in|after) ([0-9]+(?:\.[0-9]+)?)\s?(ms|s|seconds?)\b", re.I)


def backoff_s(num_failed: int) -> float:
    """Draw the seconds to wait after so many failed attempts (at least one)."""
    longest_s = min(_MAX_BACKOFF_S, _FIRST_BACKOFF_S * 2.0 ** (num_failed - 1))
    return random.uniform(0.0, longest_s)


def retry_after_s(headers: Mapping[str, str], message: str = "") -> float | None:
    """Seconds that an answer asks to wait: by a header (names in small letters), else in words; None if it does not.

    The header retry-after is a number of seconds, or a date. A date counts from the judge's own clock where the header
    date gives it, since that clock and ours may differ.
    """
    milliseconds = headers.get("retry-after-ms", "")
    if _NUMBER.fullmatch(milliseconds):
        return float(milliseconds) / 1000
    header = headers.get("retry-after")
    if header is None:
        return _wait_in_words_s(message)
    if _NUMBER.fullmatch(header):
        return float(header)
    until_s = _date_s(header)
    if until_s is None:
        return _wait_in_words_s(message)
    judge_s = _date_s(headers.get("date", ""))
    now_s = time.time() if judge_s is None else judge_s
    return max(0.0, until_s - now_s)


def _wait_in_words_s(message: str) -> float | None:
    wait = _WAIT_IN_WORDS.search(message)
    if wait is None:
        return None
    return float(wait[1]) / (1000 if wait[2].lower() == "ms" else 1)


def _date_s(header: str) -> float | None:
    """Unix time of an HTTP date; None of any other text."""
    try:
        return email.utils.parsedate_to_datetime(header).timestamp()
    except ValueError:
        return None
