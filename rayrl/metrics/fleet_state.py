"""State of a fleet, or of the oracle pool, as operators see it: `rayrl scale`, `rayrl status --live`."""

from typing import TypedDict


class FleetState(TypedDict):
    """Numbers of a fleet at one moment. For the oracle pool, a replica is a slot for one question."""

    name: str
    ready: int
    """Replicas that get calls."""
    starting: int
    """Replicas that are pending, starting, or silent."""
    draining: int
    """Replicas that get no new calls and end when their own are over."""
    calls: int
    """Calls that replicas work on."""
    waiting: int
    """Calls for which no replica has room."""
    least: int
    most: int
    needs: str
    """Resources that Ray sets aside for each replica, for messages."""
    failure: str | None
    """Reason of the last failed start; None once a later start has succeeded."""
    has_given_up: bool
    """Whether several starts in a row have failed, and none is under way."""
