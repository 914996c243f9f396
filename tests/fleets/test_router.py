"""The router as a plain class: replicas that the test answers for, and a clock that it turns."""

import asyncio
from collections import Counter
from functools import wraps

import pytest
from ray.exceptions import ActorDiedError, ActorUnavailableError

from rayrl.algorithms.scaling import ScaleRule
from rayrl.errors import FleetError
from rayrl.fleets.fleet import Fleet
from rayrl.fleets.members import BACKOFF_S, CHECK_S, HUNG_S, MAX_FAILURES, SILENT_S
from rayrl.fleets.router import LEASE_S, Lease, Router
from rayrl.metrics import meters


class Replica:
    """Its health checks are answered by the test. It is up from its first good answer until it crashes."""

    def __init__(self):
        self.status = self
        self.checks = []
        self.is_up = False

    def remote(self):
        self.checks.append(asyncio.get_running_loop().create_future())
        return self.checks[-1]

    def answer(self, error=None):
        self.is_up = self.is_up or error is None
        for check in self.checks:
            if not check.done():
                check.set_result({}) if error is None else check.set_exception(error)


class Starter:
    needs = "1 GPU, 0 CPU"

    def __init__(self):
        self.started, self.ended, self.restarted, self.cleared = {}, [], [], []

    def clear(self, fleet):
        assert not self.started
        self.cleared.append(fleet)

    def start(self, name):
        self.started[name] = Replica()
        return self.started[name]

    def is_up(self, replica):
        return replica.is_up

    def restart(self, replica):
        self.restarted.append(replica)
        replica.is_up = False

    def end(self, name, replica):
        assert self.started[name] is replica
        self.ended.append(name)


class World:
    """A fleet "f", who starts its replicas, and the time."""

    def __init__(self, num=1, least=None, most=None, max_items=4, **times):
        self.now = 0.0
        self.starter = Starter()
        rule = ScaleRule(least=least or num, most=most or num, **times)
        self.router = Router(
            "f", self.starter, num_replicas=num, rule=rule, max_items=max_items, clock=lambda: self.now
        )
        self.router.step()

    def replica(self, n):
        return self.starter.started[f"f-{n}"]

    async def after(self, seconds, *, answering=True):
        """One look, so much later, and whoever it lets go on."""
        self.now += seconds
        if answering:
            self.answer_all()
        self.router.step()
        await settled()

    def answer_all(self):
        for replica in self.starter.started.values():
            replica.answer()

    async def lease(self, num_items=1):
        found = await asyncio.wait_for(self.router.lease(num_items), 5)
        assert isinstance(found, Lease)
        return found


def in_a_loop(test):
    @wraps(test)
    def run(**fixtures):
        asyncio.run(test(**fixtures))

    return run


async def settled():
    """Let everybody go on who can."""
    for _ in range(10):
        await asyncio.sleep(0)


async def waiting(world, num=1, num_items=1):
    """Calls that wait for a lease."""
    calls = [asyncio.create_task(world.router.lease(num_items)) for _ in range(num)]
    await settled()
    return calls


@in_a_loop
async def test_only_ready_replicas_are_leased():
    world = World(num=2)
    (call,) = await waiting(world)
    await world.after(1000, answering=False)
    assert not call.done() and world.router.state()["starting"] == 2
    world.replica(1).answer()
    world.router.step()
    assert (await call).name == "f-1"
    assert [(await world.lease()).name for _ in range(2)] == ["f-1", "f-1"]


@in_a_loop
async def test_the_least_busy_replica_answers_and_the_rest_waits():
    world = World(num=2)
    await world.after(0)
    assert [(await world.lease(4)).name for _ in range(4)] == ["f-0", "f-1", "f-0", "f-1"]
    calls = await waiting(world, num=2, num_items=4)
    assert not any(call.done() for call in calls) and world.router.state()["waiting"] == 2
    leases = list(world.router._held)
    world.router.release(leases[1], "answered")
    await settled()
    assert [call.done() for call in calls] == [True, False], "first come, first served"
    assert (await calls[0]).name == "f-1"
    calls[1].cancel()


@in_a_loop
async def test_small_calls_share_a_replica_up_to_its_items():
    world = World(max_items=4)
    await world.after(0)
    for _ in range(4):
        await world.lease(1)
    (call,) = await waiting(world)
    assert not call.done()
    call.cancel()


@in_a_loop
async def test_a_wait_for_a_lease_ends_with_what_is_missing():
    world = World()
    state = await world.router.lease(1, 0.01)
    assert isinstance(state, dict)
    assert (state["ready"], state["starting"], state["waiting"], state["needs"]) == (0, 1, 0, "1 GPU, 0 CPU")
    await world.after(0)
    assert (await world.lease()).name == "f-0"


@in_a_loop
async def test_a_queue_that_lasts_brings_replicas_which_take_their_share():
    world = World(num=1, least=1, most=4, queue_s=10.0)
    await world.after(0)
    calls = await waiting(world, num=8, num_items=4)
    await world.after(0)
    await world.after(9)
    assert len(world.starter.started) == 1
    await world.after(2, answering=False)
    assert len(world.starter.started) == 4
    await world.after(10, answering=False)
    assert len(world.starter.started) == 4, "they are on their way"
    assert sum(call.done() for call in calls) == 2
    await world.after(0)
    shares = Counter(lease.name for lease in await asyncio.gather(*calls))
    assert shares == {"f-0": 2, "f-1": 2, "f-2": 2, "f-3": 2}
    assert world.router.most() == 4


@in_a_loop
async def test_the_metrics_show_the_queue_and_the_replicas_by_state():
    world = World(num=2)
    num_before = meters.CALLS.value(fleet="f")
    await world.after(0)
    leases = [await world.lease(4) for _ in range(4)]
    calls = await waiting(world, num=3)
    world.router.resize(1, 1)
    await world.after(0)
    states = {state: meters.FLEET_REPLICAS.value(fleet="f", state=state) for state in ("ready", "starting", "draining")}
    assert states == {"ready": 1, "starting": 0, "draining": 1}
    assert (meters.QUEUE_DEPTH.value(fleet="f"), meters.CALLS.value(fleet="f") - num_before) == (3, 4)
    for lease in leases:
        world.router.release(lease.id)
    await world.after(0)
    assert (meters.QUEUE_DEPTH.value(fleet="f"), meters.CALLS.value(fleet="f") - num_before) == (0, 7)
    assert all(call.done() for call in calls)


@in_a_loop
async def test_idle_replicas_drain_down_to_the_least():
    world = World(num=3, least=1, most=3, idle_s=60.0)
    await world.after(0)
    await world.after(50)
    assert world.starter.ended == []
    lease = await world.lease()
    await world.after(20)
    assert lease.name == "f-0" and world.starter.ended == ["f-1", "f-2"]
    world.router.release(lease.id)
    await world.after(1000)
    assert world.starter.ended == ["f-1", "f-2"] and world.router.state()["ready"] == 1


@in_a_loop
async def test_a_draining_replica_ends_when_its_calls_are_over():
    world = World(num=2)
    await world.after(0)
    leases = [await world.lease(4) for _ in range(3)]
    assert [lease.name for lease in leases] == ["f-0", "f-1", "f-0"]
    world.router.resize(1, 1)
    world.router.step()
    state = world.router.state()
    assert (state["ready"], state["draining"], world.starter.ended) == (1, 1, []), "f-1 has fewer calls"
    (call,) = await waiting(world, num_items=4)
    assert not call.done(), "f-1 gets no new ones"
    world.router.release(leases[1].id)
    await world.after(0)
    assert world.starter.ended == ["f-1"] and not call.done()
    world.router.release(leases[0].id)
    assert (await call).name == "f-0"


@in_a_loop
async def test_a_lease_that_nobody_renews_is_lost():
    world = World()
    await world.after(0)
    kept, lost = await world.lease(4), await world.lease(4)
    (call,) = await waiting(world)
    await world.after(LEASE_S - 1)
    world.router.renew([kept.id, "of another router"])
    assert not call.done()
    await world.after(2)
    await world.after(CHECK_S + 1)
    await world.after(1)
    assert (await call).name == "f-0"
    assert set(world.router._held) == {kept.id, (await call).id}
    world.router.release(lost.id)
    assert world.router.state()["calls"] == 2


@in_a_loop
async def test_a_silent_replica_gets_no_calls_until_it_answers():
    world = World()
    await world.after(0)
    await world.after(CHECK_S + 1, answering=False)  # a check begins, and is not answered
    await world.after(SILENT_S + 1, answering=False)
    (call,) = await waiting(world)
    assert not call.done() and world.router.state()["starting"] == 1
    await world.after(0)
    assert (await call).name == "f-0"
    assert world.starter.restarted == [] and world.starter.ended == [], "Ray restarts what crashes"


@in_a_loop
async def test_an_ended_call_is_a_sign_of_life():
    world = World()
    await world.after(0)
    first, second = await world.lease(4), await world.lease(4)
    await world.after(CHECK_S + 1, answering=False)
    await world.after(SILENT_S - 1, answering=False)
    world.router.release(first.id, "answered")
    await world.after(SILENT_S - 1, answering=False)
    assert (await world.lease(4)).name == "f-0"
    world.router.release(second.id, "suspect")
    assert world.router.state()["ready"] == 0, "a suspect waits for its next check"
    await world.after(1)
    assert world.router.state()["ready"] == 1


@in_a_loop
async def test_a_lease_that_was_given_back_unasked_says_nothing():
    world = World()
    await world.after(0)
    leases = world.router.hold()
    await world.after(CHECK_S + 1, answering=False)
    await world.after(SILENT_S + 1, answering=False)
    for lease in leases:
        world.router.release(lease.id)
    assert world.router.state()["ready"] == 0


@in_a_loop
async def test_a_hung_replica_is_killed_once_whatever_it_works_on():
    world, num_before = World(), meters.HUNG.value(fleet="f")
    await world.after(0)
    await world.lease()
    await world.after(CHECK_S + 1, answering=False)
    await world.after(HUNG_S - 1, answering=False)
    assert world.starter.restarted == []
    await world.after(2, answering=False)
    assert world.starter.restarted == [world.replica(0)]
    await world.after(10 * HUNG_S, answering=False)
    await world.after(10 * HUNG_S, answering=False)
    assert len(world.starter.restarted) == 1, "it is starting, for however long that takes"
    await world.after(0)
    assert world.router.state()["ready"] == 1
    assert meters.HUNG.value(fleet="f") - num_before == 1


@in_a_loop
async def test_a_replica_that_crashed_between_two_checks_is_starting_and_not_hung():
    world = World()
    await world.after(0)
    assert world.router.state()["ready"] == 1
    world.replica(0).is_up = False
    await world.after(1, answering=False)
    assert world.router.state()["ready"] == 0
    for _ in range(5):
        await world.after(HUNG_S, answering=False)
    assert world.starter.restarted == []
    world.replica(0).is_up = True
    await world.after(HUNG_S - 1, answering=False)
    assert world.starter.restarted == []
    await world.after(2, answering=False)
    assert world.starter.restarted == [world.replica(0)], "it came up, and does not answer"


@in_a_loop
async def test_calls_without_an_answer_kill_the_process_that_they_met_and_no_other():
    world = World(max_items=8)
    await world.after(0)
    first, second, third = [await world.lease() for _ in range(3)]
    await world.after(1)
    world.router.release(first.id, "hung")
    assert len(world.starter.restarted) == 1 and world.router.state()["ready"] == 0
    await world.after(1, answering=False)
    world.router.release(second.id, "hung")
    await world.after(1)
    world.router.release(third.id, "hung")
    assert len(world.starter.restarted) == 1, "that process is gone"
    await world.after(1)
    world.router.release((await world.lease()).id, "hung")
    assert len(world.starter.restarted) == 2


@in_a_loop
async def test_a_replica_that_is_not_well_is_restarted():
    world = World()
    await world.after(0)
    await world.after(CHECK_S + 1, answering=False)
    world.replica(0).answer(RuntimeError("the engine is dead"))
    world.router.step()
    assert world.starter.restarted == [world.replica(0)] and world.router.state()["ready"] == 0
    await world.after(1, answering=False)
    world.replica(0).answer(ActorUnavailableError("it is being restarted", None))
    world.router.step()
    assert len(world.starter.restarted) == 1
    await world.after(1, answering=False)
    await world.after(0)
    assert world.router.state()["ready"] == 1


@in_a_loop
async def test_a_replica_that_cannot_start_says_why_and_is_tried_again_later():
    world = World(num=2)
    world.replica(1).answer()
    world.replica(0).answer(ActorDiedError())
    world.router.step()
    assert world.starter.ended == ["f-0"] and len(world.starter.started) == 2
    state = await world.router.ready(0)
    assert isinstance(state, dict) and "died" in state["failure"] and state["ready"] == 1
    await world.after(BACKOFF_S - 1)
    assert len(world.starter.started) == 2
    await world.after(2)
    await world.after(0)
    assert sorted(world.starter.started) == ["f-0", "f-1", "f-2"]
    assert world.router.state()["ready"] == 2 and world.router.state()["failure"] is None


@in_a_loop
async def test_one_start_that_fails_is_no_end():
    world = World(num=3)
    ready, (call,) = asyncio.create_task(world.router.ready(1000)), await waiting(world)
    for n in range(3):
        world.replica(n).answer(ActorDiedError())
    world.router.step()
    await settled()
    assert world.router.state()["failure"] and not call.done() and not ready.done(), "three of one attempt"
    await world.after(BACKOFF_S)
    await world.after(0)
    assert (await call).name == "f-3" and len(await ready) == 3
    assert world.router.state()["failure"] is None


@in_a_loop
async def test_nobody_waits_for_a_fleet_that_cannot_start():
    world = World()
    ready, (call,) = asyncio.create_task(world.router.ready(1000)), await waiting(world)
    for n in range(MAX_FAILURES):
        assert not call.done() and not ready.done()
        world.replica(n).answer(ActorDiedError())
        world.router.step()
        await settled()
        if n + 1 < MAX_FAILURES:
            await world.after(BACKOFF_S, answering=False)
    state = await call
    assert isinstance(state, dict) and "died" in state["failure"] and state["has_given_up"]
    assert isinstance(await ready, dict)
    state = await world.router.lease()
    assert isinstance(state, dict) and (state["ready"], state["starting"]) == (0, 0)
    await world.after(BACKOFF_S, answering=False)
    (call,) = await waiting(world)
    assert not call.done(), "it is tried again"
    await world.after(0)
    assert (await call).name == f"f-{MAX_FAILURES}" and not world.router.state()["has_given_up"]


@in_a_loop
async def test_ready_gives_every_replica_and_does_not_wait_for_what_a_hand_has_added():
    world = World(num=2)
    assert isinstance(await world.router.ready(0), dict)
    await world.after(0)
    world.router.resize(4, 4)
    await world.after(0, answering=False)
    assert world.router.state()["starting"] == 2
    leases = await world.router.ready(60)
    assert [lease.name for lease in leases] == ["f-0", "f-1"]
    world.router.resize(1, 1)
    await world.after(0)
    assert world.router.state()["draining"] == 1, "held until its leases are released"
    for lease in leases:
        world.router.release(lease.id)
    await world.after(0)
    assert world.router.state()["ready"] == 1


@in_a_loop
async def test_a_hand_overrides_the_config_and_gives_it_back():
    world = World(num=1, least=1, most=2, idle_s=60.0)
    world.router.resize(4, 4)
    await world.after(0)
    await world.after(1000)
    state = world.router.state()
    assert (state["ready"], state["least"], state["most"], world.router.most()) == (4, 4, 4, 4)
    world.router.resize(None, None)
    await world.after(0)
    assert len(world.starter.ended) == 2, "down to what the config allows"
    await world.after(1000)
    assert len(world.starter.ended) == 3, "and to its least, being idle"


@in_a_loop
async def test_a_size_given_before_the_first_look_holds():
    starter = Starter()
    fixed = Router("f", starter, num_replicas=1, rule=ScaleRule(least=1, most=1), max_items=1)
    fixed.resize(3, 3)
    fixed.step()
    assert sorted(starter.started) == ["f-0", "f-1", "f-2"]


@in_a_loop
async def test_the_loop_survives_a_name_that_is_not_free_and_ends_with_the_fleet(caplog):
    starter = Starter()
    start, taken = starter.start, [True, True, True, False]

    def start_once_free(name):
        if taken.pop(0):
            raise ValueError(f"{name} is taken")
        return start(name)

    starter.start = start_once_free
    router = Router("f", starter, num_replicas=1, rule=ScaleRule(least=1, most=1), max_items=1)
    loop = asyncio.create_task(router.run())
    while not starter.started:
        await asyncio.sleep(0.01)
    assert caplog.text.count("a step of the router failed") == 1 and "f-0 is taken" in caplog.text
    assert set(starter.cleared) == {"f"}
    await asyncio.wait_for(router.stop(), 5)
    assert loop.done()
    assert starter.ended == ["f-0"] and router.state()["ready"] == 0


@in_a_loop
async def test_a_fleet_that_cannot_grow_goes_on_serving():
    world = World(num=2)
    await world.after(0)
    leases = [await world.lease(4) for _ in range(4)]
    world.router.resize(1, 1)
    await world.after(0)
    world.router.resize(4, 4)
    (call,) = await waiting(world, num_items=4)

    def refuse(name):
        raise ValueError(f"{name} is taken")

    world.starter.start = refuse
    for lease in leases:
        world.router.release(lease.id, "answered")
    with pytest.raises(ValueError, match="is taken"):
        world.router.step()
    assert (await call).name == "f-1" and world.starter.ended == ["f-0"], "the one that drained has ended"


@pytest.mark.parametrize("num_callers", [1, 3])
@in_a_loop
async def test_every_call_is_answered_while_the_fleet_grows_and_shrinks(num_callers):
    """Callers that go on asking, a hand that changes the size under them: none waits for ever, none is interrupted."""
    world = World(num=2, least=1, most=4, max_items=1, queue_s=0.0, idle_s=5.0)
    answered = []

    async def caller(n):
        for i in range(20):
            lease = await world.lease()
            await asyncio.sleep(0)
            assert lease.name not in world.starter.ended, "ended under a call"
            world.router.release(lease.id)
            answered.append((n, i))

    callers = [asyncio.create_task(caller(n)) for n in range(4 * num_callers)]
    for size in [1, 4, 2, 3] * 20:
        world.router.resize(size, size)
        await world.after(1)
    await asyncio.gather(*callers)
    assert sorted(answered) == [(n, i) for n in range(4 * num_callers) for i in range(20)]


class Answered(Fleet):
    """A fleet whose router's answers are given."""

    def __init__(self, answers):
        super().__init__("f", None)
        self.answers = answers

    def _ask(self, method, *arguments, wait_s=0.0):
        return self.answers.pop(0)


@in_a_loop
async def test_a_call_waits_for_its_turn_while_others_are_answered_and_not_for_a_fleet_without_replicas():
    world = World()
    await world.after(0)
    working, lease = world.router.state(), await world.lease()
    assert Answered([working, working, working, lease])._lease(1, 0.0) == lease
    failed = working | {"ready": 0, "failure": "no such weights", "has_given_up": True}
    with pytest.raises(FleetError, match="f: a replica cannot start: no such weights"):
        Answered([working, failed])._lease(1, 60.0)
