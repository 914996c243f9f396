"""What a Ray cluster has, and what its autoscaler may make of it: what every stage's needs are compared with."""

import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from rayrl.errors import ResourceError

HEAD = "node:__internal_head__"
"""A resource that only the head has."""
UNKNOWN = (
    "if it grows by itself, this process cannot see to what: name the autoscaler's config in RAYRL_AUTOSCALING_CONFIG, "
    "or raise the minimum"
)


@dataclass(frozen=True, kw_only=True)
class NodeType:
    """A kind of node that an autoscaler may add."""

    resources: Mapping[str, float]
    most: float
    """Nodes of it at most; infinite without a limit."""


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """The nodes that are there, each with its resources, and the kinds of which more may come."""

    nodes: tuple[Mapping[str, float], ...]
    node_types: tuple[NodeType, ...] = ()
    most_workers: float = math.inf
    """Nodes of all kinds together, without the head."""
    remark: str = ""
    """What a refusal adds, where it may be wrong."""

    def has(self, resource: str) -> float:
        """What all nodes that are there have of a resource."""
        return sum(node.get(resource, 0) for node in self.nodes)

    def most(self, resource: str) -> float:
        """What there is of a resource once the autoscaler has added all that it may, as if for nothing else."""
        total = sum(node.get(resource, 0) for node in self.nodes if HEAD in node)
        left = self.most_workers
        kinds = [(kind.resources.get(resource, 0), kind.most) for kind in self.node_types]
        for each, num in sorted(kinds, reverse=True):
            num = min(num, left)
            if each > 0 and num > 0:
                if math.isinf(num):
                    return math.inf
                total, left = total + num * each, left - num
        return max(total, self.has(resource))

    def said(self, resource: str) -> str:
        """What there is of a resource and what it may grow to, for humans."""
        has, most = self.has(resource), self.most(resource)
        return f"{has:g}" if most == has else f"{has:g} and may grow to {written(most)}"

    def largest(self, resource: str) -> float:
        """The most of a resource that one node has, or may have."""
        kinds = [kind.resources for kind in self.node_types if min(kind.most, self.most_workers) > 0]
        return max((of.get(resource, 0) for of in (*self.nodes, *kinds)), default=0)

    def memory(self) -> float:
        """Bytes of memory there may be, objects included; infinite if not every node says what it has."""
        if not all("memory" in of for of in (*self.nodes, *(kind.resources for kind in self.node_types))):
            return math.inf
        return self.most("memory") + self.most("object_store_memory")


def written(amount: float) -> str:
    """A number, or that there is no limit."""
    return "any number" if math.isinf(amount) else f"{amount:g}"


def find_cluster() -> Cluster:
    """The Ray cluster that RAY_ADDRESS names, or this machine if it names none.

    Raises:
        ResourceError: the cluster does not answer.
    """
    address = os.environ.get("RAY_ADDRESS")
    if not address or address == "local":
        gpus, memory = float(_num_local_gpus()), float(_local_memory())
        return Cluster(nodes=({"CPU": float(os.cpu_count() or 1), "GPU": gpus, "memory": memory},))
    import ray

    from rayrl.preflight.autoscaling import find_node_types

    is_ours = not ray.is_initialized()
    try:
        if is_ours:
            ray.init(address, log_to_driver=False)
        nodes = tuple(node["Resources"] for node in ray.nodes() if node["Alive"])
        found = find_node_types()
    except ConnectionError as error:
        raise ResourceError(
            f"RAY_ADDRESS must name a running cluster, got {address}: {error}; start it, or unset RAY_ADDRESS"
        ) from None
    finally:
        if is_ours:
            ray.shutdown()
    if found is None:
        return Cluster(nodes=nodes, remark=UNKNOWN)
    return Cluster(nodes=nodes, node_types=found.node_types, most_workers=found.most_workers)


def _num_local_gpus() -> int:
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return len([device for device in visible.split(",") if device.strip() not in ("", "-1", "NoDevFiles")])
    return len([name for name in os.listdir("/dev") if re.fullmatch(r"nvidia\d+", name)])


def _local_memory() -> int:
    """Bytes of this machine, or of the container it is."""
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = Path("/sys/fs/cgroup/memory.max")
    text = limit.read_text().strip() if limit.exists() else ""
    return min(machine, int(text)) if text.isdigit() else machine
