"""Results of measurements: a mean with its standard error, and a bin of a calibration table.

`rayrl.algorithms.statistics` computes them. They are kept apart from it so that reading results loads no scipy.
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean with its standard error over observations."""

    mean: float
    standard_error: float
    """Infinite for a single observation, whose spread is unknown."""
    num: int
    """Observations behind it."""


@dataclass(frozen=True, slots=True)
class CalibrationBin:
    """Judgements whose predicted scores lie in one interval."""

    low: float
    high: float
    num: int
    """At least 1: empty bins are left out."""
    mean_predicted: float
    mean_oracle: float
