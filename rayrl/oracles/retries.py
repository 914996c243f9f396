"""When a failed request is tried again, and how long to wait before that."""

import email.utils
import re
import time

import openai
import tenacity

_MAX_WAIT_S = 300.0
"""A judge that asks to be left alone for longer is given up on: the query abstains, unbilled."""
_RETRIED_STATUS = frozenset({408, 409, 429})
# By name, since the SDK's transport is httpx or httpx2, depending on its version.
_NEVER_SENT = frozenset({"ConnectError", "ConnectTimeout", "PoolTimeout", "UnsupportedProtocol"})

_backoff_s = tenacity.wait_random_exponential(multiplier=0.5, max=30)


def was_sent(error: BaseException) -> bool:
    """Whether the question may have reached the judge before the connection or the time was lost."""
    return type(error.__cause__).__name__ not in _NEVER_SENT


def may_retry(error: BaseException) -> bool:
    """Whether an attempt surely cost nothing, and another one may go better."""
    if isinstance(error, openai.APIStatusError):
        may_pass = error.status_code in _RETRIED_STATUS or error.status_code >= 500
        return may_pass and (retry_after_s(error) or 0.0) <= _MAX_WAIT_S
    return isinstance(error, openai.APIConnectionError) and not was_sent(error)


def wait_s(state: tenacity.RetryCallState) -> float:
    """What the judge asks for, else exponential backoff with jitter."""
    error = state.outcome.exception() if state.outcome else None
    asked_s = retry_after_s(error) if isinstance(error, openai.APIStatusError) else None
    return _backoff_s(state) if asked_s is None else asked_s


def retry_after_s(error: openai.APIStatusError) -> float | None:
    """The Retry-After header: a number of seconds, or a date, which counts from the judge's clock if it tells it."""
    header = error.response.headers.get("retry-after")
    if header is None:
        return None
    if re.fullmatch(r"[0-9]+(\.[0-9]+)?", header):
        return float(header)
    until_s, now_s = _date_s(header), _date_s(error.response.headers.get("date", ""))
    return None if until_s is None else max(0.0, until_s - (time.time() if now_s is None else now_s))


def _date_s(header: str) -> float | None:
    """Unix time of an HTTP date; None if it is none."""
    try:
        return email.utils.parsedate_to_datetime(header).timestamp()
    except ValueError:
        return None
