"""Fleets on real Ray that change their size while they are called; the replicas only sleep."""

import asyncio
import os
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import ray

from rayrl.actors.control import find_control, start_control
from rayrl.actors.fleet import start_replicas
from rayrl.actors.replicas import Replicas
from rayrl.algorithms.scaling import ScaleRule
from rayrl.cli import main
from rayrl.errors import FleetError, RunDirectoryError, StageTimeout
from rayrl.records import Checkpoint


class Sleeper:
    """Answers after a while, with who it is and what it was asked; serves the version a request names."""

    def __init__(self, spec):
        if spec == "broken":
            raise RuntimeError("no such weights")
        self.version = "first"

    async def status(self):
        return {"version": self.version, "start_s": 0.0, "started_at": 0.0, "swaps_s": [], "pid": os.getpid()}

    async def adopt(self, checkpoint, in_flight):
        self.version = checkpoint.version
        return self.version

    async def work(self, items, seconds):
        await asyncio.sleep(seconds)
        return [(os.getpid(), item) for item in items]


@pytest.fixture
def start(ray_cluster):
    """Starts fleets, and stops them."""
    fleets = []

    def start(name, num, spec="", *, options=None, **rule):
        rule = ScaleRule(**({"least": num, "most": num, "queue_s": 0.5, "idle_s": 2.0} | rule))
        replicas = Replicas(replica=Sleeper, spec=spec, options={"max_concurrency": 100} | (options or {}))
        fleets.append(start_replicas(name, replicas, num, rule=rule))
        return fleets[-1]

    yield start
    for fleet in fleets:
        fleet.stop()


def until(condition, seconds=60):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it never came to that"
        time.sleep(0.1)


def ask(fleet, num, seconds):
    """So many calls at once; the answers as (pid, item)."""
    with ThreadPoolExecutor(num) as calls:
        return [calls.submit(fleet.call, "work", [i], seconds) for i in range(num)]


def state(fleet):
    return ray.get(fleet.router.state.remote())


def resize(fleet, num):
    ray.get(fleet.router.resize.remote(num, num))


def pids(fleet):
    return {status["pid"] for status in fleet.wait_ready(60)}


def test_a_fleet_grows_under_a_queue_and_shrinks_when_idle(start):
    fleet = start("grows", 1, least=1, most=3)
    assert len(pids(fleet)) == 1 and fleet.concurrency == 6
    answers = [answer.result() for answer in ask(fleet, 60, 0.5)]
    assert sorted(item for ((_, item),) in answers) == list(range(60)), "every call is answered, once"
    assert len({pid for ((pid, _),) in answers}) == 3
    until(lambda: state(fleet)["ready"] == 1 and state(fleet)["draining"] == 0)
    assert len(pids(fleet)) == 1


def test_a_removed_replica_ends_its_calls_first(start):
    fleet = start("drains", 2)
    before = pids(fleet)
    with ThreadPoolExecutor(4) as calls:
        answers = [calls.submit(fleet.call, "work", [i], 3.0) for i in range(4)]
        until(lambda: state(fleet)["calls"] == 4)
        resize(fleet, 1)
        until(lambda: state(fleet)["draining"] == 1)
    assert {pid for answer in answers for pid, _ in answer.result()} == before
    until(lambda: state(fleet)["draining"] == 0)
    assert pids(fleet) < before


def test_who_has_no_room_stays_pending_and_is_not_asked(start):
    fleet = start("pends", 1, options={"num_cpus": 3})
    alone = pids(fleet)
    resize(fleet, 2)
    until(lambda: state(fleet)["starting"] == 1)
    answers = [answer.result() for answer in ask(fleet, 8, 0.1)]
    assert {pid for ((pid, _),) in answers} == alone
    assert pids(fleet) == alone, "a hand that asks for too much does not stop the run"
    resize(fleet, 1)
    until(lambda: state(fleet)["starting"] == 0)


def test_a_wait_says_what_is_missing(start):
    fleet = start("waits", 2, options={"num_cpus": 3})
    with pytest.raises(StageTimeout, match=r"2 engines .*1 ready, 1 starting.* each takes 0 GPU, 3 CPU; free in"):
        fleet.wait_ready(20)
    nobody = start("nobody", 1, options={"num_cpus": 99})
    with pytest.raises(StageTimeout, match="0 ready, 1 starting"):
        nobody.call("work", [1], 0.0, timeout_s=1.0)


def test_a_replica_that_cannot_start_says_why(start):
    fleet = start("breaks", 1, "broken")
    with pytest.raises(FleetError, match="no such weights"):
        fleet.wait_ready(60)
    with pytest.raises(FleetError, match="no such weights"):
        fleet.call("work", [1], 0.0)


def test_a_killed_replica_answers_the_same_calls(start):
    fleet = start("killed", 2)
    first = min(pids(fleet))
    with ThreadPoolExecutor(4) as calls:
        answers = [calls.submit(fleet.call, "work", [i], 2.0) for i in range(4)]
        until(lambda: state(fleet)["calls"] == 4)
        os.kill(first, signal.SIGKILL)
    assert sorted(item for answer in answers for _, item in answer.result()) == [0, 1, 2, 3]
    until(lambda: len(pids(fleet)) == 2 and first not in pids(fleet))


def test_a_restarted_router_starts_replicas_anew_and_the_calls_go_on(start):
    fleet = start("router", 1)
    before = pids(fleet)
    with ThreadPoolExecutor(1) as calls:
        answer = calls.submit(fleet.call, "work", [7], 5.0)
        until(lambda: state(fleet)["calls"] == 1)
        ray.kill(fleet.router, no_restart=False)
    ((pid, item),) = answer.result()
    assert item == 7 and pid not in before


def test_all_that_are_ready_adopt_weights(start):
    fleet = start("adopts", 2)
    fleet.wait_ready(60)
    fleet.adopt(Checkpoint(path="nowhere", version="second"))
    assert [status["version"] for status in fleet.wait_ready(60)] == ["second"] * 2
    until(lambda: state(fleet)["calls"] == 0)


def test_a_fleet_is_scaled_by_hand_and_remembers_it(start, capsys):
    control = start_control("by-hand", "generators")
    fleet = start("by-hand-generators", 1)
    try:
        ray.get(control.show.remote("generators", fleet.name, fleet.router))
        assert scale(capsys, "by-hand", "evaluators=3")[-1] == "3"
        until(lambda: state(fleet)["ready"] == 3)
        assert scale(capsys, "by-hand")[:3] == ["by-hand-generators", "3", "0"]
        fleet.stop()
        again = start("by-hand-generators", 1)
        ray.get(control.show.remote("generators", again.name, again.router))
        assert state(again)["least"] == 3, "a fleet that is released and started again has the size of the hand"
        scale(capsys, "by-hand", "generators=auto")
        until(lambda: state(again)["ready"] == 1 and state(again)["draining"] == 0)
    finally:
        ray.kill(control)


def scale(capsys, *arguments):
    """The last row of what `rayrl scale` prints."""
    with pytest.raises(SystemExit) as stopped:
        main(["scale", *arguments])
    assert stopped.value.code == 0
    return capsys.readouterr().out.splitlines()[-1].split()


def test_a_stopped_run_is_told_and_waited_for(ray_cluster, capsys):
    control = start_control("told", "generators")

    def driver():
        ray.get(control.stopped.remote())
        ray.kill(control)

    run = threading.Thread(target=driver)
    run.start()
    with pytest.raises(SystemExit) as stopped:
        main(["stop", "told"])
    run.join(timeout=30)
    assert stopped.value.code == 0 and "told has ended" in capsys.readouterr().out
    with pytest.raises(RunDirectoryError, match="run must be the name or the folder of one that is alive"):
        find_control("told")
