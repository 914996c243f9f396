"""Retries of failed requests to a judge: which are tried again, and after how long."""

import email.utils
import re
import time

import openai
import tenacity

_MAX_WAIT_S = 300.0
"""If a judge asks for a longer wait, the query abstains, unbilled."""
_RETRIED_STATUS = frozenset({408, 409, 429})
# By name, since the SDK's transport is httpx or httpx2, depending on its version.
_NEVER_SENT = frozenset({"ConnectError", "ConnectTimeout", "PoolTimeout", "UnsupportedProtocol"})

_backoff_s = tenacity.wait_random_exponential(multiplier=0.5, max=30)


def was_sent(error: BaseException) -> bool:
    """Return whether the question may have reached the judge before the connection was lost or the time was over."""
    return type(error.__cause__).__name__ not in _NEVER_SENT


def may_retry(error: BaseException) -> bool:
    """Return whether a failed attempt surely cost nothing, and another one may succeed."""
    if isinstance(error, openai.APIStatusError):
        may_pass = error.status_code in _RETRIED_STATUS or error.status_code >= 500
        return may_pass and (retry_after_s(error) or 0.0) <= _MAX_WAIT_S
    return isinstance(error, openai.APIConnectionError) and not was_sent(error)


def wait_s(state: tenacity.RetryCallState) -> float:
    """Seconds to wait before the next attempt: as the judge asks for, else exponential backoff with jitter."""
    error = state.outcome.exception() if state.outcome else None
    asked_s = retry_after_s(error) if isinstance(error, openai.APIStatusError) else None
    return _backoff_s(state) if asked_s is None else asked_s


def retry_after_s(error: openai.APIStatusError) -> float | None:
    """Seconds that the Retry-After header asks for; None without one.

    The header is a number of seconds, or a date. A date counts from the judge's own clock where the Date header gives
    it, since that clock and ours may differ.
    """
    header = error.response.headers.get("retry-after")
    if header is None:
        return None
    if re.fullmatch(r"[0-9]+(\.[0-9]+)?", header):
        return float(header)
    until_s = _date_s(header)
    if until_s is None:
        return None
    judge_s = _date_s(error.response.headers.get("date", ""))
    now_s = time.time() if judge_s is None else judge_s
    return max(0.0, until_s - now_s)


def _date_s(header: str) -> float | None:
    """Unix time of an HTTP date; None of any other text."""
    try:
        return email.utils.parsedate_to_datetime(header).timestamp()
    except ValueError:
        return None
