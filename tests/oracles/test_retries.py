"""Waits that a judge asks for, when its clock and ours disagree."""

import email.utils
import time
from types import SimpleNamespace

import pytest

from rayrl.oracles.retries import retry_after_s


def asked(**headers):
    """As much of the SDK's error as is read: the response's headers."""
    return retry_after_s(SimpleNamespace(response=SimpleNamespace(headers=headers)))  # type: ignore[arg-type]


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
