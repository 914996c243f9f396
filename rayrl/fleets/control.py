"""What an operator can ask of a run while it goes on: how its fleets are, other sizes for them, and an end.

One named actor per run, `<run>-control`, in the namespace that all runs of a cluster share. `rayrl scale` and `rayrl
stop` talk to it from anywhere in the cluster; the driver gives it the fleets as they come up, and tells it all of them
again every few seconds, so that neither a control nor a router that Ray had to start again has forgotten anything.
"""

import asyncio
import logging
import time
from contextlib import suppress
from typing import Any

import ray
from ray.exceptions import ActorUnavailableError, GetTimeoutError, RayActorError, RayError, RayTaskError
from ray.util import list_named_actors
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from rayrl.errors import RunDirectoryError, StageTimeout
from rayrl.fleets.sizes import Size
from rayrl.metrics.fleet_state import FleetState

logger = logging.getLogger(__name__)

NAMESPACE = "rayrl"
"""Of every run's named actors."""
SUFFIX = "-control"
ASK_S = 30.0
"""For a control's answer."""
FOLLOW_S = 10.0
"""Between two times that a driver tells its control all."""
_ANSWER_S = 20.0
"""For what a control asks a router."""
_NAME_TIMEOUT_S = 90.0
"""For how long a dead driver's actors may keep their names: Ray takes a minute to notice that a node is gone."""


class Control:
    """A plain class; `show`, `follow`, `scale`, `states` and `stop` are what others call.

    Args:
        evaluators: the role whose fleet serves the evaluator.
    """

    def __init__(self, evaluators: str):
        self._evaluators = evaluators
        self._shown: dict[str, tuple[str, Any]] = {}
        self._sizes: dict[str, Size] = {}
        self._stopped = asyncio.Event()

    async def show(self, role: str, name: str, actor: Any) -> None:
        """Take in what has `state` and `resize`; it gets the size its role was given by hand, if it was."""
        self._shown[name] = (role, actor)
        await self._resize({name: (role, actor)}, self._sizes)

    async def follow(self, shown: dict[str, tuple[str, Any]], sizes: dict[str, Size]) -> dict[str, Size] | None:
        """Take in all that was shown and every role's size, and give the sizes to who has lost them.

        Returns:
            Every role's size, after a while; None once the run is to end.
        """
        self._shown |= shown
        self._sizes = sizes | self._sizes
        try:
            await self._resize(self._shown, self._sizes)
        except Exception as error:  # of one router: the driver comes again
            logger.warning("sizes given by hand: %s", error)
        with suppress(TimeoutError):
            await asyncio.wait_for(self._stopped.wait(), FOLLOW_S)
            return None
        return self._sizes

    async def scale(self, sizes: dict[str, Size]) -> list[FleetState]:
        """Resize what is up, and what comes up later in these roles; the states of what was resized."""
        sizes = {self._evaluators if role == "evaluators" else role: size for role, size in sizes.items()}
        self._sizes |= sizes
        return await self._resize(self._shown, sizes)

    async def states(self) -> list[FleetState]:
        """How the fleets that are up are, and the oracle."""
        return await self._answers({name: actor.state.remote() for name, (_, actor) in self._shown.items()})

    async def stop(self) -> None:
        """Ask the driver to end the run. Never answers: who asks learns when it has ended, and this with it."""
        self._stopped.set()
        await asyncio.Event().wait()

    async def _resize(self, shown: dict[str, tuple[str, Any]], sizes: dict[str, Size]) -> list[FleetState]:
        asked = {name: (actor, sizes[role]) for name, (role, actor) in shown.items() if role in sizes}
        return await self._answers({n: actor.resize.remote(s.least, s.most) for n, (actor, s) in asked.items()})

    async def _answers(self, calls: dict[str, Any]) -> list[FleetState]:
        """What is up answers; what has been released meanwhile does not."""
        waits = [asyncio.wait_for(call, _ANSWER_S) for call in calls.values()]
        answers = await asyncio.gather(*waits, return_exceptions=True)
        for name, answer in zip(calls, answers, strict=True):
            if isinstance(answer, TimeoutError):
                raise StageTimeout(f"{name} has not answered the run's control within {_ANSWER_S:.0f} s")
            if isinstance(answer, BaseException) and not isinstance(answer, RayActorError):
                raise answer
        return [answer for answer in answers if not isinstance(answer, BaseException)]


class Driver:
    """The driver's end of its control; it remembers what a control that was started again does not."""

    def __init__(self, control: Any):
        self._control = control
        self._shown: dict[str, tuple[str, Any]] = {}
        self._sizes: dict[str, Size] = {}

    def show(self, role: str, name: str, actor: Any) -> None:
        """Let an operator see a router or the oracle pool, which gets the size that its role was given by hand."""
        self._shown[name] = (role, actor)
        ask(self._control, "show", role, name, actor)

    def follow(self) -> bool:
        """Keep the control informed until an operator ends the run, or, which is False, the run is over."""
        while True:
            try:
                follow = self._control.follow.options(max_task_retries=0)  # a retry at the end would be told as a fault
                sizes: Any = ray.get(follow.remote(dict(self._shown), self._sizes), timeout=FOLLOW_S + ASK_S)
            except (ActorUnavailableError, GetTimeoutError):
                time.sleep(1.0)
                continue
            except RayError:  # its last act was to end its control
                return False
            if sizes is None:
                return True
            self._sizes = sizes


def ask(control: Any, method: str, *arguments: Any) -> Any:
    """A control's answer.

    Raises:
        StageTimeout: it gives none, or one of the routers that it asks.
        RunDirectoryError: its run has ended meanwhile.
    """
    try:
        return ray.get(control.__getattr__(method).remote(*arguments), timeout=ASK_S)
    except RayTaskError as error:
        raise error.cause from None
    except RayActorError:
        raise RunDirectoryError("run must be alive, and has ended meanwhile; start it again to continue it") from None
    except GetTimeoutError:
        raise StageTimeout(
            f"the run's control, on its driver's node, has not answered {method} within {ASK_S:.0f} s"
        ) from None


def start_control(run_name: str, evaluators: str) -> Any:
    """Start a run's control on the driver's node.

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
            return ray.remote(Control).options(**options).remote(evaluators)
        except ValueError:  # the name is taken, perhaps by a driver that has just died
            if time.monotonic() > deadline:
                raise RunDirectoryError(
                    f"name must be unique in the cluster: a run {run_name!r} is alive; `rayrl stop {run_name}` ends "
                    "it, or choose another name"
                ) from None
            time.sleep(0.5)


def find_control(run_name: str) -> Any:
    """The control of a live run of this cluster.

    Raises:
        RunDirectoryError: there is no such run; names those that there are.
    """
    try:
        return ray.get_actor(run_name + SUFFIX)
    except ValueError:
        alive = sorted(name.removesuffix(SUFFIX) for name in list_named_actors() if name.endswith(SUFFIX))
        raise RunDirectoryError(
            f"run must be the name or the folder of one that is alive in this cluster, got {run_name}; alive: "
            f"{', '.join(alive) or 'none'}"
        ) from None
