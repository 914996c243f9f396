"""Errors that rayrl raises on purpose.

    RayRLError
    |-- ConfigError        (ValueError)    a user's setting: names the field, the rule, the value and the remedy
    |-- DataError          (ValueError)    a user's file: missing, empty, or without a needed column
    |-- ResourceError      (RuntimeError)  the cluster lacks resources that a stage needs
    |-- BudgetExhausted    (RuntimeError)  the ledger refuses a paid query
    |   `-- UsdExhausted                   since the budget in USD is used up
    |-- JudgeFailed        (RuntimeError)  the oracle itself fails, and not one question: the asking stopped
    |-- RewardFailed       (RuntimeError)  a user's reward function raised, or returned no number
    |-- RunDirectoryError  (ValueError)    the run directory belongs to another config, or cannot be used
    |-- DiskFull           (OSError)       a disk has no room for a run's files: the path, and the free bytes
    |-- WeightSyncError    (RuntimeError)  a replica's weights are not the trainer's
    |-- FleetError         (RuntimeError)  no replica of a fleet can start, or survives a call
    |-- WaitingForPeople   (RuntimeError)  questions lie where people answer them; the same command goes on later
    |-- TrainingStopped    (RuntimeError)  a training that broke, or left the limits that its config sets
    `-- StageTimeout       (TimeoutError)  a wait ended without its event, which the message names

Every class takes one message and nothing else: an exception with another signature does not survive the trip across
Ray processes.
"""


class RayRLError(Exception):
    """Base of every error rayrl raises on purpose."""


class ConfigError(RayRLError, ValueError):
    """A setting breaks a rule. The message names field, rule, value and remedy."""


class DataError(RayRLError, ValueError):
    """An input file is missing, empty, malformed or lacks a column."""


class ResourceError(RayRLError, RuntimeError):
    """A stage needs more than the cluster has. The message names the resource, the need and the supply."""


class BudgetExhausted(RayRLError, RuntimeError):
    """The ledger refused to reserve a query: the budget is spent."""


class UsdExhausted(BudgetExhausted):
    """One more query could exceed `oracle.budget_usd`. The same command goes on once that is raised."""


class JudgeFailed(RayRLError, RuntimeError):
    """The oracle failed, and the asking stopped. The message names cause and remedy; the same command goes on."""


class WaitingForPeople(RayRLError, RuntimeError):
    """People have not answered enough questions yet. The message says how many, and where they lie."""


class RewardFailed(RayRLError, RuntimeError):
    """A user's reward function raised, or returned no number. The message has its own traceback; the run stops."""


class RunDirectoryError(RayRLError, ValueError):
    """The run directory belongs to another config, or cannot be written."""


class DiskFull(RayRLError, OSError):
    """A disk has no room left. The message names the path, the free bytes and the files that are kept."""


class WeightSyncError(RayRLError, RuntimeError):
    """A replica serves other weights than the trainer wrote."""


class FleetError(RayRLError, RuntimeError):
    """No replica of a fleet can start, or survives a call. The message gives the last one's reason."""


class TrainingStopped(RayRLError, RuntimeError):
    """A training was stopped on purpose. The message names the measured value, the limit and the remedy."""


class StageTimeout(RayRLError, TimeoutError):
    """A wait ended without its event. The message names the event."""
