"""Cluster: the resources of its nodes, and those that its autoscaler may add.

A plan compares the needs of every stage with these numbers. Finding out what a running cluster has is the work of
`rayrl.preflight.discovery`.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

HEAD = "node:__internal_head__"
"""A resource that only the head has."""
GPU_BYTES = "gpu_bytes"
"""Entry of a node beside its resources: memory of one of its GPUs, which Ray does not count. Absent is unknown."""
COMPUTE_CAPABILITY = "compute_capability"
"""Entry of a node beside its resources: CUDA's compute capability of its GPUs. Absent is unknown."""
BFLOAT16_SINCE = 8.0
"""Compute capability from which GPUs compute in bfloat16, and vLLM accepts it."""


@dataclass(frozen=True, kw_only=True)
class NodeType:
    """A kind of node that an autoscaler may add."""

    resources: Mapping[str, float]
    most: float
    """Nodes of it at most; infinite without a limit."""


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """The nodes of a cluster, each with its resources, and the kinds of node that may be added."""

    nodes: tuple[Mapping[str, float], ...]
    node_types: tuple[NodeType, ...] = ()
    most_workers: float = math.inf
    """Nodes of all kinds together, without the head."""
    name: str = ""
    """Which cluster it is, for a plan; empty if it is not told."""
    remark: str = ""
    """Added to a refusal that may be wrong, because the autoscaler's limits are not known."""

    def has(self, resource: str) -> float:
        """Sum of a resource over the nodes that are up."""
        return _total(resource, self.nodes)

    def most(self, resource: str) -> float:
        """Amount of a resource once the autoscaler has added all nodes it may, chosen for this resource alone."""
        total = _total(resource, [node for node in self.nodes if HEAD in node])
        workers_left = self.most_workers
        kinds = [(kind.resources.get(resource, 0), kind.most) for kind in self.node_types]
        # The richest kind first: the limit on all workers together leaves the others less room.
        for amount, most in sorted(kinds, reverse=True):
            num = min(most, workers_left)
            if amount <= 0 or num <= 0:
                continue
            if math.isinf(num):
                return math.inf
            total += num * amount
            workers_left -= num
        # Nodes that were started by hand count too, whatever the autoscaler's limits are.
        return max(total, self.has(resource))

    def describe(self, resource: str) -> str:
        """Present and possible amount of a resource, for a message."""
        has, most = self.has(resource), self.most(resource)
        return f"{has:g}" if most == has else f"{has:g} and may grow to {describe_amount(most)}"

    def largest(self, resource: str) -> float:
        """Largest amount of a resource that one node has, or may have."""
        amounts = [node.get(resource, 0) for node in self.nodes]
        for kind in self.node_types:
            if min(kind.most, self.most_workers) > 0:
                amounts.append(kind.resources.get(resource, 0))
        return max(amounts, default=0)

    def gpu_bytes(self) -> float | None:
        """Memory of the largest GPU that there is, or may be; None if that of some GPU is not known."""
        sizes = [kind.get(GPU_BYTES) for kind in self._kinds_with_gpus()]
        known = [size for size in sizes if size is not None]
        return max(known) if known and len(known) == len(sizes) else None

    def has_bfloat16(self) -> bool:
        """Return whether no GPU is known to lack bfloat16."""
        return all(kind.get(COMPUTE_CAPABILITY, math.inf) >= BFLOAT16_SINCE for kind in self._kinds_with_gpus())

    def without_gpus(self) -> "Cluster":
        """The same nodes as a run that uses no GPU sees them."""
        node_types = tuple(replace(kind, resources=_without_gpus(kind.resources)) for kind in self.node_types)
        return replace(self, nodes=tuple(_without_gpus(node) for node in self.nodes), node_types=node_types)

    def _kinds_with_gpus(self) -> list[Mapping[str, float]]:
        """The nodes with GPUs that are there, and the kinds of them that may be added."""
        kinds = [*self.nodes]
        if self.most_workers > 0:
            kinds += [kind.resources for kind in self.node_types if kind.most > 0]
        return [kind for kind in kinds if kind.get("GPU", 0) > 0]

    def memory(self) -> float:
        """Bytes of memory there may be, objects included; infinite if the memory of some node is not known."""
        for resources in (*self.nodes, *(kind.resources for kind in self.node_types)):
            if "memory" not in resources:
                return math.inf
        # Ray subtracts its object store from a node's memory; engines and workers may have both.
        return self.most("memory") + self.most("object_store_memory")


def _without_gpus(resources: Mapping[str, float]) -> dict[str, float]:
    return {name: amount for name, amount in resources.items() if name != "GPU"}


def _total(resource: str, nodes: Iterable[Mapping[str, float]]) -> float:
    return sum(node.get(resource, 0) for node in nodes)


def describe_amount(amount: float) -> str:
    """Write a number; an infinite one as "any number"."""
    return "any number" if math.isinf(amount) else f"{amount:g}"
