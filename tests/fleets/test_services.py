"""The end of a run's fleets."""

import pytest

from rayrl.errors import FleetError, StageTimeout
from rayrl.fleets.fleet import Fleet
from rayrl.fleets.services import Services


class Ending(Fleet):
    """Says what is given, or raises it."""

    def __init__(self, name, said):
        super().__init__(name, None)
        self.said, self.is_stopped = said, False

    def hold_ready(self):
        return []

    def statuses(self, leases, timeout_s=0.0):
        if isinstance(self.said, Exception):
            raise self.said
        return self.said

    def wait_ready(self, timeout_s=0.0):
        raise AssertionError("a run that is over waits for no replica")

    def stop(self):
        self.is_stopped = True


class Times:
    """The run's notes."""

    def __init__(self):
        self.noted = []

    def record_time(self, name, seconds):
        self.noted.append((name, seconds))


@pytest.mark.parametrize("error", [FleetError("its router is gone"), StageTimeout("it says nothing")])
def test_what_a_fleet_does_not_say_at_the_end_fails_no_run(error):
    services = object.__new__(Services)
    services.run = Times()
    fleets = {"a": Ending("a", error), "b": Ending("b", [{"swaps_s": [1.0, 2.0]}, {"swaps_s": []}])}
    services._fleets, services._timed = dict(fleets), {"a", "b"}
    services.release()
    assert all(fleet.is_stopped for fleet in fleets.values()) and not services._fleets
    assert services.run.noted == [("swap:b", 1.0), ("swap:b", 2.0)]
