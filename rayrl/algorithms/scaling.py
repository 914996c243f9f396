"""How many replicas a fleet should have, from what it is seen to do. A decision, not an action: no Ray, no clock."""

from dataclasses import dataclass

CALLS_PER_REPLICA = 2
"""Calls that keep a replica busy: one that it works on, and the next, so that it never waits for work."""


@dataclass(frozen=True, kw_only=True)
class FleetLoad:
    """What is to be seen of a fleet at one moment."""

    num_replicas: int
    """Ready or starting. Those that drain are gone already."""
    num_starting: int
    num_waiting: int
    """Calls that no replica has room for."""
    waiting_s: float
    """For how long enough calls have waited to keep one more replica busy; 0 if they do not."""
    idle_s: tuple[float, ...]
    """For how long each replica without a call has had none."""


@dataclass(frozen=True, kw_only=True)
class ScaleRule:
    """Between which sizes a fleet may be, and how patient it is."""

    least: int
    most: int
    queue_s: float = 10.0
    """Seconds for which calls have waited before replicas are added."""
    idle_s: float = 300.0
    """Seconds without a call after which a replica may go."""


def scale_decision(load: FleetLoad, rule: ScaleRule) -> int:
    """Replicas to add, or as a negative number to remove.

    The bounds come first. A queue that has lasted asks for as many replicas as it would keep busy, less those on their
    way: one step from 1 to 64, which is what an autoscaling cluster has to see. Replicas go when nobody waits and they
    have been idle for long. In between nothing changes, so that a fleet does not swing.
    """
    if load.num_replicas < rule.least:
        return rule.least - load.num_replicas
    if load.num_replicas > rule.most:
        return rule.most - load.num_replicas
    if load.num_waiting >= CALLS_PER_REPLICA:
        if load.waiting_s < rule.queue_s:
            return 0
        wanted = load.num_waiting // CALLS_PER_REPLICA - load.num_starting
        return max(0, min(wanted, rule.most - load.num_replicas))
    if load.num_waiting == 0:
        num_idle = sum(idle_s >= rule.idle_s for idle_s in load.idle_s)
        return -min(num_idle, load.num_replicas - rule.least)
    return 0
