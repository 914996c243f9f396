"""Numbers, estimates, durations and foreign text as a reader sees them, in the page, the notebooks and the terminal."""

import math
import re
from dataclasses import fields, is_dataclass

from pydantic import JsonValue

from rayrl.algorithms.estimate import Estimate

NOT_RUN = "not run"
"""Stands for a number of a stage that has not finished."""
_UNPRINTABLE = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


def is_known(estimate: Estimate | None) -> bool:
    """Return whether an estimate has both its mean and its standard error; one observation has no standard error."""
    return estimate is not None and math.isfinite(estimate.mean) and math.isfinite(estimate.standard_error)


def is_above(estimate: Estimate | None, value: float = 0.0) -> bool:
    """Return whether an estimate lies more than two standard errors above a value; False if that is not known."""
    if estimate is None or not is_known(estimate):
        return False
    return estimate.mean - value > 2 * estimate.standard_error


def plus_minus(estimate: Estimate | None, *, signed: bool = False, percent: bool = False) -> str:
    """Write an estimate with its standard error: `+0.42 ± 0.05`. A mean without a standard error is not shown."""
    if estimate is None or not math.isfinite(estimate.mean):
        return "not measured"
    if not math.isfinite(estimate.standard_error):
        return "no standard error"
    sign = "+" if signed else ""
    if percent:
        return f"{100 * estimate.mean:{sign}.1f}% \u00b1 {100 * estimate.standard_error:.1f}"
    # Two significant digits of the standard error, about.
    digits = 3 if estimate.standard_error < 0.05 else 2
    return f"{estimate.mean:{sign}.{digits}f} \u00b1 {estimate.standard_error:.{digits}f}"


def number(value: float | None, pattern: str = ",.0f", *, missing: str = NOT_RUN) -> str:
    """Write a number, or `missing` for one that is None or not finite."""
    return missing if value is None or not math.isfinite(value) else f"{value:{pattern}}"


def duration(seconds: float | None, *, missing: str = "") -> str:
    """Write seconds as a reader would, or `missing` for None."""
    if seconds is None:
        return missing
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"


def printable(text: str) -> str:
    """Replace control and direction-changing characters, with which foreign text could disguise itself."""
    return _UNPRINTABLE.sub("\ufffd", text)


def json_value(value: object) -> JsonValue:
    """Turn dataclasses, lists and dictionaries into JSON values; NaN and infinity, which JSON lacks, become null."""
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(name): json_value(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [json_value(item) for item in value]
    assert is_dataclass(value), f"{value!r} is no JSON value"
    return {field.name: json_value(getattr(value, field.name)) for field in fields(value)}
