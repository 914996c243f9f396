"""What an operator can ask of a run while it goes on: how its fleets are, other sizes for them, and an end.

One named actor per run, `<run>-control`, in the namespace that all runs of a cluster share. `rayrl scale` and `rayrl
stop` talk to it from anywhere in the cluster; the driver gives it the fleets as they come up.
"""

import asyncio
import time
from typing import Any

import ray
from ray.exceptions import RayActorError
from ray.util import list_named_actors
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from rayrl.actors.router import FleetState
from rayrl.config.sizes import Size
from rayrl.errors import RunDirectoryError

NAMESPACE = "rayrl"
"""Of every run's named actors."""
SUFFIX = "-control"
_NAME_TIMEOUT_S = 30.0
"""For how long a dead driver's actors may keep their names."""


class Control:
    """A plain class; `show`, `scale`, `states` and `stop` are what others call.

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
        if role in self._sizes:
            await actor.resize.remote(self._sizes[role].least, self._sizes[role].most)

    async def scale(self, sizes: dict[str, Size]) -> list[FleetState]:
        """Resize what is up, and what comes up later in these roles; the states of what was resized."""
        sizes = {self._evaluators if role == "evaluators" else role: size for role, size in sizes.items()}
        self._sizes |= sizes
        asked = [(actor, sizes[role]) for role, actor in self._shown.values() if role in sizes]
        return await self._answers([actor.resize.remote(size.least, size.most) for actor, size in asked])

    async def states(self) -> list[FleetState]:
        """How the fleets that are up are, and the oracle."""
        return await self._answers([actor.state.remote() for _, actor in self._shown.values()])

    def stop(self) -> None:
        """Ask the driver to end the run."""
        self._stopped.set()

    async def stopped(self) -> None:
        """Wait until the run is to end."""
        await self._stopped.wait()

    async def forever(self) -> None:
        """Never answers: who asks learns when the run has ended."""
        await asyncio.Event().wait()

    async def _answers(self, calls: list[Any]) -> list[FleetState]:
        """What is up answers; what has been released meanwhile does not."""
        answers = await asyncio.gather(*calls, return_exceptions=True)
        for answer in answers:
            if isinstance(answer, BaseException) and not isinstance(answer, RayActorError):
                raise answer
        return [answer for answer in answers if not isinstance(answer, BaseException)]


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
