"""How Ray starts, restarts and ends a fleet's replicas. Where they run, and what happens to one that crashes, is Ray's.

A replica that Ray has no room for yet stays pending: that is the demand an autoscaling cluster answers with a node.
"""

import re
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import ray
from ray.core.generated.gcs_pb2 import ActorTableData  # pyright: ignore[reportAttributeAccessIssue]
from ray.util import get_placement_group, placement_group, placement_group_table, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

MAX_RETRIES = 5
"""Replicas one call may lose; a call that kills every replica it meets must end."""


@dataclass(frozen=True, kw_only=True)
class Replicas:
    """A kind of replica: `members.Starter` on Ray."""

    replica: type[Any]
    """The actors' plain class: made from a spec, with a `status`."""
    spec: Any
    options: dict[str, Any]
    """Ray's. That a replica reserves no CPU, restarts, and has its calls repeated, need not be said."""

    @property
    def needs(self) -> str:
        """What Ray sets aside for each of them."""
        return f"{self.options.get('num_gpus', 0):g} GPU, {self.options.get('num_cpus', 0):g} CPU"

    def clear(self, fleet: str) -> None:
        """Remove the groups of a router that died: they outlive it, and hold their GPUs."""
        for group in placement_group_table().values():
            if re.fullmatch(rf"{re.escape(fleet)}-\d+", group["name"]) and group["state"] != "REMOVED":
                self._remove_group(group["name"])

    def start(self, name: str) -> Any:
        """Start a replica; returns at once. More than one GPU is a placement group, of one node."""
        options = {"num_cpus": 0, "max_restarts": -1, "max_task_retries": MAX_RETRIES} | self.options
        if options.get("num_gpus", 0) > 1:
            group = placement_group([{"GPU": options["num_gpus"]}], strategy="STRICT_PACK", name=name)
            options = options | {"scheduling_strategy": PlacementGroupSchedulingStrategy(group, 0)}
        return ray.remote(self.replica).options(name=name, **options).remote(self.spec)

    def is_up(self, replica: Any) -> bool:
        """Whether Ray says that its process has started, and has not ended: known here, without asking anybody."""
        return replica._get_local_state() == ActorTableData.ALIVE

    def restart(self, replica: Any) -> None:
        """Kill a replica's process; Ray starts another, and repeats what it was doing."""
        ray.kill(replica, no_restart=False)

    def end(self, name: str, replica: Any) -> None:
        """End a replica, and free what it held."""
        ray.kill(replica, no_restart=True)
        if self.options.get("num_gpus", 0) > 1:
            self._remove_group(name)

    def _remove_group(self, name: str) -> None:
        with suppress(ValueError):  # there is none
            remove_placement_group(get_placement_group(name))
