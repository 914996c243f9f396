"""Number of replicas that a load asks for."""

import pytest

from rayrl.algorithms.scaling import FleetLoad, ScaleRule, scale_decision

RULE = ScaleRule(least=1, most=8, queue_s=10.0, idle_s=300.0)


def decision(rule=RULE, **load):
    quiet = {"num_replicas": 2, "num_starting": 0, "num_waiting": 0, "waiting_s": 0.0, "idle_s": ()}
    return scale_decision(FleetLoad(**(quiet | load)), rule)


@pytest.mark.parametrize(
    ("load", "change"),
    [
        ({}, 0),
        ({"num_waiting": 4, "waiting_s": 9.9}, 0),  # not for long enough
        ({"num_waiting": 4, "waiting_s": 10.0}, 2),  # two calls keep a replica busy
        ({"num_waiting": 5, "waiting_s": 10.0}, 2),
        ({"num_waiting": 1, "waiting_s": 99.0}, 0),  # no work for another one
        ({"num_waiting": 4, "waiting_s": 60.0, "num_replicas": 4, "num_starting": 2}, 0),  # they are on their way
        ({"num_waiting": 6, "waiting_s": 60.0, "num_replicas": 4, "num_starting": 2}, 1),
        ({"num_waiting": 200, "waiting_s": 10.0}, 6),  # in one step, up to the most
        ({"num_waiting": 200, "waiting_s": 10.0, "num_replicas": 8}, 0),
    ],
)
def test_a_queue_that_lasts_adds_what_it_would_keep_busy(load, change):
    assert decision(**load) == change


@pytest.mark.parametrize(
    ("load", "change"),
    [
        ({"idle_s": (299.0, 10.0)}, 0),
        ({"idle_s": (300.0, 10.0)}, -1),
        ({"idle_s": (300.0, 400.0)}, -1),  # the least stays
        ({"idle_s": (300.0,), "num_waiting": 1}, 0),  # no replica is removed while a call waits
        ({"idle_s": (500.0,) * 5, "num_replicas": 8}, -5),
    ],
)
def test_replicas_that_are_idle_for_long_go(load, change):
    assert decision(**load) == change


def test_bounds_come_before_anything_else():
    assert decision(num_replicas=0) == 1
    assert decision(ScaleRule(least=4, most=4), num_replicas=2) == 2
    assert decision(ScaleRule(least=1, most=2), num_replicas=5, num_waiting=40, waiting_s=99.0) == -3


def test_a_fixed_fleet_never_changes():
    fixed = ScaleRule(least=2, most=2, queue_s=0.0, idle_s=0.0)
    assert decision(fixed, num_waiting=100, waiting_s=100.0) == 0
    assert decision(fixed, idle_s=(1e9, 1e9)) == 0


def test_a_fleet_does_not_swing():
    """The replicas that a queue asked for are not asked for again, and stay while they work."""
    rule = ScaleRule(least=1, most=8, queue_s=0.0, idle_s=60.0)
    assert decision(rule, num_replicas=1, num_waiting=14) == 7
    assert decision(rule, num_replicas=8, num_starting=7, num_waiting=14) == 0
    assert decision(rule, num_replicas=8, idle_s=(5.0, 8.0)) == 0
