"""Numbers and text as a reader sees them."""

import math

import pytest

from rayrl.report.formats import duration, is_above, json_value, number, plus_minus, printable
from tests.report.made_up_runs import estimate


def test_no_mean_without_its_standard_error():
    assert plus_minus(estimate(0.5, 0.1), signed=True) == "+0.50 \u00b1 0.10"
    assert plus_minus(estimate(0.5, 0.01)) == "0.500 \u00b1 0.010"
    assert plus_minus(estimate(0.66, 0.05), percent=True) == "66.0% \u00b1 5.0"
    assert plus_minus(estimate(0.5, None)) == "no standard error"
    assert plus_minus(estimate(math.nan, 0.1)) == "not measured"
    assert plus_minus(None) == "not measured"


@pytest.mark.parametrize(
    ("seconds", "expected"), [(None, ""), (3.14, "3.1 s"), (75.4, "1 min 15 s"), (7512.0, "2 h 05 min")]
)
def test_durations(seconds, expected):
    assert duration(seconds) == expected


def test_two_standard_errors_above():
    assert is_above(estimate(0.71, 0.1), 0.5) and not is_above(estimate(0.7, 0.1), 0.5)
    assert is_above(estimate(0.3, 0.1))
    assert not is_above(None) and not is_above(estimate(0.9, None))


def test_numbers():
    assert (number(1234.5), number(None), number(math.nan, missing="-")) == ("1,234", "not run", "-")


def test_control_and_direction_changing_characters_are_replaced():
    assert printable("a\u202eb\x07c\td\n") == "a\ufffdb\ufffdc\td\n"


def test_estimates_are_json_values():
    assert json_value({"gain": estimate(0.5, None), "pair": (1, None)}) == {
        "gain": {"mean": 0.5, "standard_error": None, "num": 64},
        "pair": [1, None],
    }
