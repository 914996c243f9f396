"""Control of a run for operators: `rayrl scale` and `rayrl stop` while the run goes on.

One named actor per run, `<run>-control`, in the namespace that all runs of a cluster share, so that operators can reach
it from anywhere in the cluster. It shows the state of the run's fleets and of its oracle pool, resizes them, and tells
the driver to end the run.

The driver registers each fleet's router as it comes up. Every few seconds it also sends all registrations and all sizes
again. So a control that Ray had to restart learns them anew, and through it a router that Ray had to restart gets the
size that an operator gave its role.
"""

import asyncio
import logging
import time
from collections.abc import Awaitable, Mapping
from contextlib import suppress
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.exceptions import ActorUnavailableError, GetTimeoutError, RayActorError, RayError, RayTaskError
from ray.util import list_named_actors
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from rayrl.errors import RunDirectoryError, StageTimeout
from rayrl.fleets import actors
from rayrl.fleets.actors import Actor
from rayrl.fleets.sizes import Size
from rayrl.metrics.fleet_state import FleetState

logger = logging.getLogger(__name__)

SUFFIX = "-control"
ASK_TIMEOUT_S = 30.0
"""Longest wait for an answer of a control."""
FOLLOW_S = 10.0
"""Time between two reports of a driver to its control."""
_ROUTER_TIMEOUT_S = 20.0
"""Longest wait of a control for an answer of a router."""
_NAME_TIMEOUT_S = 90.0
"""How long a dead driver's actors may keep their names: Ray takes a minute to notice that a node is gone."""

Registered = tuple[str, Actor]
"""Role of a fleet or of the oracle pool, and the actor that has its methods `state` and `resize`."""


class Control:
    """Registrations and sizes of one run. A plain class, run as an actor.

    Args:
        evaluators: role whose fleet serves the evaluator.
    """

    def __init__(self, evaluators: str):
        self._evaluators = evaluators
        self._registered: dict[str, Registered] = {}
        self._sizes: dict[str, Size] = {}
        self._stop_requested = asyncio.Event()

    async def show(self, role: str, name: str, actor: Actor) -> None:
        """Register a router or the oracle pool, and give it the size that an operator gave its role, if any."""
        self._registered[name] = (role, actor)
        await self._resize({name: (role, actor)}, self._sizes)

    async def follow(self, registered: dict[str, Registered], sizes: dict[str, Size]) -> dict[str, Size] | None:
        """Take the driver's report: all registrations and sizes, in case this actor or a router was restarted.

        The driver calls this in a loop. A call returns after `FOLLOW_S`, or as soon as the run is to end.

        Returns:
            Every role's size; None if the run is to end.
        """
        self._registered |= registered
        self._sizes = sizes | self._sizes  # sizes given to this control are newer than those that the driver keeps
        try:
            await self._resize(self._registered, self._sizes)
        except Exception as error:
            # The failure of one router must not end the loop, on which `stop` depends. The next report tries again.
            logger.warning("sizes given by an operator could not be applied: %s", error)
        with suppress(TimeoutError):
            await asyncio.wait_for(self._stop_requested.wait(), FOLLOW_S)
            return None
        return self._sizes

    async def scale(self, sizes: dict[str, Size]) -> list[FleetState]:
        """Resize what is registered in these roles now or later; returns the states of what was resized."""
        # "evaluators" is not a role of its own, but the one that serves the evaluator in this run.
        sizes = {self._evaluators if role == "evaluators" else role: size for role, size in sizes.items()}
        self._sizes |= sizes
        return await self._resize(self._registered, sizes)

    async def states(self) -> list[FleetState]:
        """Return the states of the fleets and of the oracle pool."""
        return await self._answers({name: actor.state.remote() for name, (_, actor) in self._registered.items()})

    async def stop(self) -> None:
        """Request the end of the run. The call never returns: it fails when the run has ended this actor.

        So a caller that waits for it learns when the run has ended.
        """
        self._stop_requested.set()
        await asyncio.Event().wait()

    async def _resize(self, registered: Mapping[str, Registered], sizes: Mapping[str, Size]) -> list[FleetState]:
        calls = {}
        for name, (role, actor) in registered.items():
            if role in sizes:
                calls[name] = actor.resize.remote(sizes[role].least, sizes[role].most)
        return await self._answers(calls)

    async def _answers(self, calls: Mapping[str, Awaitable[FleetState]]) -> list[FleetState]:
        """Wait for the answers, leaving out those of actors that have been released meanwhile.

        Raises:
            StageTimeout: an actor gives no answer; the message names it.
        """
        waits = [asyncio.wait_for(call, _ROUTER_TIMEOUT_S) for call in calls.values()]
        answers = await asyncio.gather(*waits, return_exceptions=True)
        states: list[FleetState] = []
        for name, answer in zip(calls, answers, strict=True):
            if isinstance(answer, TimeoutError):
                raise StageTimeout(f"{name} has not answered the run's control within {_ROUTER_TIMEOUT_S:.0f} s")
            if isinstance(answer, RayActorError):  # the fleet was released, and its router ended with it
                continue
            if isinstance(answer, BaseException):
                raise answer
            states.append(answer)
        return states


class Driver:
    """The driver's side of its control. It keeps the registrations and sizes that a restarted control needs."""

    def __init__(self, control: Actor):
        self._control = control
        self._registered: dict[str, Registered] = {}
        self._sizes: dict[str, Size] = {}

    def show(self, role: str, name: str, actor: Actor) -> None:
        """Register a router or the oracle pool with the control, for operators to see and resize."""
        # Kept here first: if the control is being restarted now, the next report brings it.
        self._registered[name] = (role, actor)
        ask(self._control, "show", role, name, actor)

    def follow(self) -> bool:
        """Report to the control again and again.

        Return True when an operator ends the run, False when the run is over.
        """
        while True:
            try:
                # Without retries: at the end of a run the control is gone, and Ray would log a retry as a fault.
                follow = self._control.follow.options(max_task_retries=0)
                report = follow.remote(dict(self._registered), self._sizes)
                sizes: dict[str, Size] | None = ray.get(report, timeout=FOLLOW_S + ASK_TIMEOUT_S)
            except (ActorUnavailableError, GetTimeoutError):  # Ray restarts the control
                time.sleep(1.0)
                continue
            except RayError:  # a run's last act is to end its control
                return False
            if sizes is None:
                return True
            self._sizes = sizes


def ask(control: Actor, method: str, *arguments: object) -> Any:
    """Call a method of a control and return its answer.

    Raises:
        StageTimeout: the control gives no answer, or one of the routers that it asks.
        RunDirectoryError: its run has ended meanwhile.
    """
    try:
        return ray.get(getattr(control, method).remote(*arguments), timeout=ASK_TIMEOUT_S)
    except RayTaskError as error:  # its message is the actor's traceback; the cause has the message for the user
        raise error.cause from None
    except RayActorError:
        raise RunDirectoryError("run must be alive, and has ended meanwhile; start it again to continue it") from None
    except GetTimeoutError:
        raise StageTimeout(
            f"the run's control, on its driver's node, has not answered {method} within {ASK_TIMEOUT_S:.0f} s"
        ) from None


def start_control(run_name: str, evaluators: str) -> ActorHandle:
    """Start a run's control on the driver's node.

    Args:
        run_name: name of the run.
        evaluators: role whose fleet serves the evaluator.

    Raises:
        RunDirectoryError: another live run has this name.
    """
    options = {
        "name": run_name + SUFFIX,
        "num_cpus": 0,
        "max_restarts": -1,
        "max_task_retries": -1,
        "scheduling_strategy": NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False),
    }
    deadline = time.monotonic() + _NAME_TIMEOUT_S
    while True:
        try:
            return actors.start(Control, options, evaluators)
        except ValueError:  # the name is taken, perhaps by a driver that has just died
            if time.monotonic() > deadline:
                raise RunDirectoryError(
                    f"name must be unique in the cluster: a run {run_name!r} is alive; `rayrl stop {run_name}` ends "
                    "it, or choose another name"
                ) from None
            time.sleep(0.5)


def find_control(run_name: str) -> ActorHandle:
    """Find the control of a live run of this cluster.

    Raises:
        RunDirectoryError: there is no such run; the message names the live ones.
    """
    try:
        return ray.get_actor(run_name + SUFFIX)
    except ValueError:
        alive = sorted(name.removesuffix(SUFFIX) for name in list_named_actors() if name.endswith(SUFFIX))
        raise RunDirectoryError(
            f"run must be the name or the folder of one that is alive in this cluster, got {run_name}; alive: "
            f"{', '.join(alive) or 'none'}"
        ) from None
