"""Waits that a judge asks for, when its clock and ours disagree."""

import email.utils
import time

import pytest

from rayrl.oracles.retries import backoff_s, retry_after_s


def asked(message="", **headers):
    return retry_after_s(headers, message)


def date(unix_s):
    return email.utils.formatdate(unix_s, usegmt=True)


@pytest.mark.parametrize("skew_s", [-7200, 0, 7200])
def test_a_date_counts_from_the_judges_clock(skew_s):
    there = int(time.time()) + skew_s
    assert asked(**{"retry-after": date(there + 20), "date": date(there)}) == 20


def test_a_date_without_the_judges_time_counts_from_ours():
    assert asked(**{"retry-after": date(time.time() + 20)}) == pytest.approx(20, abs=2)
    assert asked(**{"retry-after": date(time.time() + 20), "date": "soon"}) == pytest.approx(20, abs=2)
    assert asked(**{"retry-after": date(time.time() - 20)}) == 0


def test_seconds_need_no_clock():
    assert asked(**{"retry-after": "1.5", "date": date(0)}) == 1.5
    assert asked() is None and asked(**{"retry-after": "later"}) is None


def test_milliseconds_count_before_seconds():
    assert asked(**{"retry-after-ms": "1500"}) == 1.5
    assert asked(**{"retry-after-ms": "250", "retry-after": "1"}) == 0.25
    assert asked(**{"retry-after-ms": "soon", "retry-after": "1"}) == 1


@pytest.mark.parametrize(
    ("message", "wait_s"),
    [
        ("Rate limit reached. Please try again in 20s.", 20),
        ("Please retry in 34.07s", 34.07),
        ("try again in 6ms", 0.006),
        ("retry after 2 seconds", 2),
        ("try again in a while", None),
        ("2 seconds", None),
    ],
)
def test_a_wait_in_words_counts_where_no_header_tells(message, wait_s):
    assert asked(message) == wait_s
    assert asked(message, **{"retry-after": "3"}) == 3


def test_backoff_doubles_up_to_half_a_minute():
    for num_failed, longest_s in ((1, 0.5), (2, 1.0), (4, 4.0), (50, 30.0)):
        drawn = [backoff_s(num_failed) for _ in range(200)]
        assert min(drawn) >= 0 and longest_s / 2 < max(drawn) <= longest_s
