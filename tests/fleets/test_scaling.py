"""Fleets on real Ray that change their size while they are called; the replicas only sleep."""

import asyncio
import os
import signal
import threading
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import ray
from ray.util import placement_group, placement_group_table

from rayrl.algorithms.scaling import ScaleRule
from rayrl.cli import main
from rayrl.errors import FleetError, RunDirectoryError, StageTimeout, WeightSyncError
from rayrl.fleets.control import Driver, find_control, start_control
from rayrl.fleets.fleet import Fleet, start_replicas
from rayrl.fleets.members import HUNG_S
from rayrl.fleets.replicas import Replicas
from rayrl.fleets.router import Lease, Router
from rayrl.records import Checkpoint


class Sleeper:
    """Answers after a while, with who it is and what it was asked; serves the version a request names.

    A spec is "", "broken", or a folder: the first replica that starts there fails, and leaves a note.
    """

    def __init__(self, spec):
        if spec == "broken":
            raise RuntimeError("no such weights")
        if spec and not (Path(spec) / "failed").exists():
            (Path(spec) / "failed").touch()
            raise RuntimeError("no weights yet")
        self.version = "first"

    async def status(self):
        return {"version": self.version, "start_s": 0.0, "started_at": 0.0, "swaps_s": [], "pid": os.getpid()}

    async def adopt(self, checkpoint, in_flight):
        if checkpoint.version == "false":
            raise WeightSyncError("away from the trainer")
        self.version = checkpoint.version
        return self.version

    async def hang(self, notes):
        """The first to be asked says nothing any more, to nobody."""
        note = Path(notes) / f"asked-{os.getpid()}"
        note.touch()
        if len(list(note.parent.glob("asked-*"))) == 1:
            time.sleep(10_000)
        return os.getpid()

    async def work_once(self, notes):
        """Works for ever, and leaves a note each time it is asked."""
        (Path(notes) / uuid.uuid4().hex).touch()
        await asyncio.sleep(10_000)

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
        fleet.wait_ready(240)
    with pytest.raises(FleetError, match="no such weights"):
        fleet.call("work", [1], 0.0, timeout_s=120)


def test_a_replica_that_fails_once_is_started_again_and_waited_for(start, tmp_path):
    fleet = start("once", 1, str(tmp_path))
    assert len(fleet.wait_ready(120)) == 1 and (tmp_path / "failed").exists()


def test_a_hung_replica_is_replaced_and_its_calls_are_repeated(ray_cluster, tmp_path):
    """The router in this process, by a clock on which a minute is three seconds."""
    replicas = Replicas(replica=Sleeper, spec="", options={"max_concurrency": 100})
    rule, began = ScaleRule(least=1, most=1), time.monotonic()

    async def scenario():
        router = Router(
            "hangs", replicas, num_replicas=1, rule=rule, max_items=1, clock=lambda: 20 * (time.monotonic() - began)
        )
        loop = asyncio.create_task(router.run())
        (lease,) = await router.ready(20 * 60)
        asked = asyncio.ensure_future(lease.replica.hang.remote(str(tmp_path)))
        deadline = time.monotonic() + HUNG_S / 20 + 30
        while not asked.done():
            assert time.monotonic() < deadline, "nobody replaced it"
            router.renew([lease.id])
            await asyncio.sleep(0.1)
        assert len(list(tmp_path.iterdir())) == 2, "one hung, and one answered"
        router.release(lease.id, "answered")
        assert len(await router.ready(20 * 60)) == 1
        await router.stop()
        await loop

    asyncio.run(asyncio.wait_for(scenario(), 120))


def test_a_call_that_is_given_up_is_not_repeated(start, tmp_path):
    fleet = start("given-up", 2)
    first = pids(fleet)
    with pytest.raises(StageTimeout, match="gave no answer to work_once within 3 s"):
        fleet.call("work_once", str(tmp_path), timeout_s=3.0)
    assert len(list(tmp_path.iterdir())) == 2, "asked of two replicas, once each"
    until(lambda: state(fleet)["ready"] == 2 and state(fleet)["calls"] == 0)
    assert pids(fleet).isdisjoint(first), "what gave no answer was killed"
    assert len(list(tmp_path.iterdir())) == 2


def test_a_dead_replica_hides_no_false_weights_of_another(ray_cluster):
    gone, false = [ray.remote(Sleeper).remote("") for _ in range(2)]
    ray.get([gone.status.remote(), false.status.remote()], timeout=60)
    ray.kill(gone)

    class Held(Fleet):
        def hold_ready(self):
            return [Lease(id=name, name=name, replica=replica) for name, replica in (("a", gone), ("b", false))]

        def renew(self, leases):
            pass

        release = renew

    fleet = Held("held", None)
    with pytest.raises(WeightSyncError, match="away from the trainer"):
        fleet.adopt(Checkpoint(path="nowhere", version="false"), timeout_s=60)
    fleet.adopt(Checkpoint(path="nowhere", version="true"), timeout_s=60)
    ray.kill(false)


def test_a_router_removes_the_groups_of_an_earlier_one_of_its_fleet(ray_cluster):
    names = ["groups-0", "groups-12", "groups-of-another-0", "another"]
    groups = {name: placement_group([{"CPU": 0.1}], name=name) for name in names}
    try:
        Replicas(replica=Sleeper, spec="", options={"num_gpus": 2}).clear("groups")
        until(lambda: live_groups(names) == {"groups-of-another-0", "another"})
    finally:
        for group in groups.values():
            ray.util.remove_placement_group(group)


def live_groups(names):
    table = placement_group_table().values()
    return {group["name"] for group in table if group["name"] in names and group["state"] != "REMOVED"}


def test_a_fleet_that_has_ended_is_named(start):
    fleet = start("ended", 1)
    fleet.stop()
    with pytest.raises(FleetError, match="ended: its router has ended"):
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
    driver = Driver(control)
    fleet = start("by-hand-generators", 1)
    try:
        driver.show("generators", fleet.name, fleet.router)
        assert scale(capsys, "by-hand", "evaluators=3")[-1] == "3"
        until(lambda: state(fleet)["ready"] == 3)
        assert scale(capsys, "by-hand")[:3] == ["by-hand-generators", "3", "0"]
        fleet.stop()
        again = start("by-hand-generators", 1)
        driver.show("generators", again.name, again.router)
        assert state(again)["least"] == 3, "a fleet that is released and started again has the size of the hand"
        scale(capsys, "by-hand", "generators=auto")
        until(lambda: state(again)["ready"] == 1 and state(again)["draining"] == 0)
    finally:
        ray.kill(control)


def test_neither_a_control_nor_a_router_that_is_started_again_forgets_the_hand(start, capsys):
    control = start_control("restarted", "generators")
    driver, fleet = Driver(control), start("restarted-generators", 1)
    driver.show("generators", fleet.name, fleet.router)
    followed = threading.Thread(target=driver.follow)
    followed.start()
    try:
        scale(capsys, "restarted", "generators=2")
        until(lambda: driver._sizes)
        before = [pid_of(actor) for actor in (control, fleet.router)]
        ray.kill(control, no_restart=False)
        ray.kill(fleet.router, no_restart=False)
        until(lambda: pid_of(control) != before[0] and pid_of(fleet.router) != before[1])
        until(lambda: state(fleet)["least"] == 2)
        assert scale(capsys, "restarted")[0] == "restarted-generators"
    finally:
        ray.kill(control)
    followed.join(timeout=60)
    assert not followed.is_alive()


def pid_of(actor):
    return ray.get(actor.__ray_call__.remote(lambda _: os.getpid()), timeout=60)


def test_a_run_that_has_ended_is_told_in_one_line(ray_cluster):
    control = start_control("gone", "generators")
    driver = Driver(control)
    ray.kill(control)
    assert driver.follow() is False
    with pytest.raises(RunDirectoryError, match="has ended meanwhile"):
        driver.show("generators", "nothing", None)


def scale(capsys, *arguments):
    """The last row of what `rayrl scale` prints."""
    with pytest.raises(SystemExit) as stopped:
        main(["scale", *arguments])
    assert stopped.value.code == 0
    return capsys.readouterr().out.splitlines()[-1].split()


def test_a_stopped_run_is_told_and_waited_for(ray_cluster, capsys):
    control = start_control("told", "generators")

    def driver():
        assert Driver(control).follow()
        ray.kill(control)

    run = threading.Thread(target=driver)
    run.start()
    with pytest.raises(SystemExit) as stopped:
        main(["stop", "told"])
    run.join(timeout=30)
    assert stopped.value.code == 0 and "told has ended" in capsys.readouterr().out
    with pytest.raises(RunDirectoryError, match="run must be the name or the folder of one that is alive"):
        find_control("told")
