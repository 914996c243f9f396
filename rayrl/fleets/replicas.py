"""Replicas of a fleet as Ray actors: their start, restart and end. Implements `rayrl.fleets.members.Starter`.

Ray decides where a replica runs and starts one again that crashes. A replica for which Ray has no room yet stays
pending: this is the demand that an autoscaling cluster answers with a node.
"""

import re
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, cast

from ray.actor import ActorHandle
from ray.core.generated.gcs_pb2 import ActorTableData  # pyright: ignore[reportAttributeAccessIssue]
from ray.util import get_placement_group, placement_group, placement_group_table, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from rayrl.fleets import actors
from rayrl.fleets.actors import Actor

MAX_RETRIES = 5
"""Replicas that one call may lose before it fails: a call may itself be what kills each replica it meets."""


@dataclass(frozen=True, kw_only=True)
class Replicas:
    """A kind of replica, and how its processes are started."""

    replica: type
    """Plain class of the actors: made from a spec, with a method `status`."""
    spec: object
    options: dict[str, Any]
    """Options of Ray's for the actors, besides the defaults in `start`."""

    @property
    def needs(self) -> str:
        """Resources that Ray sets aside for each replica, for messages."""
        return f"{self.options.get('num_gpus', 0):g} GPU, {self.options.get('num_cpus', 0):g} CPU"

    def clear(self, fleet: str) -> None:
        """Remove the placement groups of a router that died: they outlive it and hold their GPUs."""
        for group in placement_group_table().values():
            is_of_fleet = re.fullmatch(rf"{re.escape(fleet)}-\d+", group["name"])
            if is_of_fleet and group["state"] != "REMOVED":
                self._remove_group(group["name"])

    def start(self, name: str) -> Actor:
        """Start a replica; returns at once. A replica of several GPUs gets a placement group on one node."""
        # No CPU is reserved unless the options say so: an engine that reserved the last one would leave none to the
        # tasks that call it.
        options = {"num_cpus": 0, "max_restarts": -1, "max_task_retries": MAX_RETRIES} | self.options
        if options.get("num_gpus", 0) > 1:
            group = placement_group([{"GPU": options["num_gpus"]}], strategy="STRICT_PACK", name=name)
            options |= {"scheduling_strategy": PlacementGroupSchedulingStrategy(group, 0)}
        return actors.start(self.replica, {"name": name, **options}, self.spec)

    def is_up(self, replica: Actor) -> bool:
        """Tell whether the replica's process has started and has not ended, as far as this process knows."""
        # Ray keeps the state of every actor of which this process has a handle: no call is needed, and none can hang.
        return cast("ActorHandle", replica)._get_local_state() == ActorTableData.ALIVE

    def restart(self, replica: Actor) -> None:
        """Kill a replica's process; Ray starts another and repeats the calls that it was working on."""
        actors.kill(replica, no_restart=False)

    def end(self, name: str, replica: Actor) -> None:
        """End a replica, and free its resources."""
        actors.kill(replica, no_restart=True)
        if self.options.get("num_gpus", 0) > 1:
            self._remove_group(name)

    def _remove_group(self, name: str) -> None:
        with suppress(ValueError):  # raised if there is no such group
            remove_placement_group(get_placement_group(name))
