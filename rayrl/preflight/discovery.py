"""Discovery of the cluster that a run will use: the Ray cluster of RAY_ADDRESS, or this machine."""

import os
import re
from dataclasses import replace
from pathlib import Path

from rayrl.fleets.connection import LOCAL, cluster_address, connect, describe_address
from rayrl.preflight.cluster import Cluster
from rayrl.preflight.gpus import facts_of_accelerator, facts_of_this_machine, gpu_facts

LIMITS_UNKNOWN = (
    "if it grows by itself, this process cannot see to what: name the autoscaler's config in RAYRL_AUTOSCALING_CONFIG, "
    "or raise the minimum"
)


def find_cluster() -> Cluster:
    """Ask the Ray cluster that RAY_ADDRESS names for its nodes; look at this machine if it names none.

    Nodes with GPUs are asked for their memory and compute capability, where they tell them (`rayrl.preflight.gpus`).

    Raises:
        ResourceError: the cluster does not answer.
    """
    address = cluster_address()
    if address == LOCAL:
        gpus, memory = float(_num_local_gpus()), float(_local_memory())
        node = {"CPU": float(os.cpu_count() or 1), "GPU": gpus, "memory": memory}
        return Cluster(nodes=(node | (facts_of_this_machine() if gpus else {}),), name=describe_address(address))
    # Only here: ray takes seconds to import, and a plan for this machine needs none of it.
    import ray

    from rayrl.preflight.autoscaling import find_node_types

    connects_here = not ray.is_initialized()
    connect()
    try:
        alive = [node for node in ray.nodes() if node["Alive"]]
        nodes = tuple(node["Resources"] | gpu_facts(node) for node in alive)
        growth = find_node_types()
    finally:
        if connects_here:
            ray.shutdown()
    if growth is None:
        return Cluster(nodes=nodes, remark=LIMITS_UNKNOWN, name=describe_address(address))
    node_types = tuple(
        replace(kind, resources={**kind.resources, **facts_of_accelerator(kind.resources)})
        for kind in growth.node_types
    )
    return Cluster(nodes=nodes, node_types=node_types, most_workers=growth.most_workers, name=describe_address(address))


def _num_local_gpus() -> int:
    """Count the GPUs that CUDA_VISIBLE_DEVICES leaves visible; without it, those with a device file."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        # Ray and CUDA write "no device" in different ways.
        return len([device for device in visible.split(",") if device.strip() not in ("", "-1", "NoDevFiles")])
    return len([name for name in os.listdir("/dev") if re.fullmatch(r"nvidia\d+", name)])


def _local_memory() -> int:
    """Bytes of memory of this machine, or of the container that this process runs in."""
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = Path("/sys/fs/cgroup/memory.max")
    text = limit.read_text().strip() if limit.exists() else ""
    # A container without a limit of its own has the word "max" here.
    return min(machine, int(text)) if text.isdigit() else machine
