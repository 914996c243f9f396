"""Scaling rule of a fleet: the number of replicas to add or remove, from an observation of its load.

It decides and does not act: it holds no clock and no state, and starts no replica.
"""

from dataclasses import dataclass

CALLS_PER_REPLICA = 2
"""Calls that keep a replica busy: one that it works on, and the next, so that it never waits for work."""


@dataclass(frozen=True, kw_only=True)
class FleetLoad:
    """Load of a fleet at one moment."""

    num_replicas: int
    """Ready or starting replicas. Draining ones no longer count."""
    num_starting: int
    num_waiting: int
    """Calls that wait because no replica has room for them."""
    waiting_s: float
    """Seconds for which enough calls to keep one more replica busy have waited; 0 if fewer wait."""
    idle_s: tuple[float, ...]
    """Seconds without a call, of each replica that has none now."""


@dataclass(frozen=True, kw_only=True)
class ScaleRule:
    """Bounds of a fleet's size, and the patience before it changes."""

    least: int
    most: int
    queue_s: float = 10.0
    """Seconds for which calls have waited before replicas are added."""
    idle_s: float = 300.0
    """Seconds without a call after which a replica may be removed."""


def scale_decision(load: FleetLoad, rule: ScaleRule) -> int:
    """Count the replicas to add, or as a negative number those to remove.

    The bounds come first. A queue that has lasted asks for as many replicas as it would keep busy, less those that are
    starting: min(floor(waiting / 2) - starting, most - replicas). That is one step from 1 to 64, so that an
    autoscaling cluster sees the whole demand at once. Replicas are removed when no call waits and they have been idle
    for long. In between nothing changes, so that the size of the fleet does not swing.
    """
    if load.num_replicas < rule.least:
        return rule.least - load.num_replicas
    if load.num_replicas > rule.most:
        return rule.most - load.num_replicas
    if load.num_waiting >= CALLS_PER_REPLICA:
        if load.waiting_s < rule.queue_s:
            return 0
        num_kept_busy = load.num_waiting // CALLS_PER_REPLICA
        num_wanted = num_kept_busy - load.num_starting
        num_allowed = rule.most - load.num_replicas
        # More may be starting than the queue needs: a queue never removes replicas.
        return max(0, min(num_wanted, num_allowed))
    if load.num_waiting == 0:
        num_idle = sum(idle_s >= rule.idle_s for idle_s in load.idle_s)
        num_above_least = load.num_replicas - rule.least
        return -min(num_idle, num_above_least)
    return 0
