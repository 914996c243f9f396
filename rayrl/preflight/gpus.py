"""GPU facts of nodes: memory and compute capability, which are no resources of Ray.

A node that is up is asked: its driver's `nvidia-smi` knows. Of a kind of node that an autoscaler may add only the name
of its accelerator is known, if that: ACCELERATORS has those names of Ray that stand for one size. What cannot be found
out stays unknown, and then nothing is refused for it.
"""

import logging
import subprocess
from collections.abc import Mapping
from typing import Any

from rayrl.preflight.cluster import COMPUTE_CAPABILITY, GPU_BYTES

logger = logging.getLogger(__name__)

TIMEOUT_S = 30.0
"""Longest wait for a node's answer."""
MIB = 2**20
ACCELERATORS = {
    "T4": (15_360, 7.5),
    "L4": (23_034, 8.9),
    "A10G": (23_028, 8.6),
    "L40S": (46_068, 8.9),
    "A100-40G": (40_960, 8.0),
    "A100-80G": (81_920, 8.0),
    "H100": (81_559, 9.0),
    "H200": (143_771, 9.0),
    "B200": (183_359, 10.0),
}
"""MiB and compute capability by Ray's name of the accelerator, as `nvidia-smi` tells them."""
_PREFIX = "accelerator_type:"


def facts_of_this_machine() -> dict[str, float]:
    """Ask this machine's driver for its GPUs; the least of each fact, or nothing where it does not answer."""
    query = ["nvidia-smi", "--query-gpu=memory.total,compute_cap", "--format=csv,noheader,nounits"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=TIMEOUT_S, check=True).stdout
        return parse(answer)
    except (OSError, subprocess.SubprocessError, ValueError) as error:
        logger.debug("memory and compute capability of the GPUs are not known: %s", error)
        return {}


def parse(answer: str) -> dict[str, float]:
    """Read lines of MiB and compute capability, one for each GPU.

    Raises:
        ValueError: it is something else, as on a GPU that is split into instances.
    """
    gpus = [line.split(",") for line in answer.splitlines() if line.strip()]
    if not gpus:
        return {}
    return {
        GPU_BYTES: min(float(memory) for memory, _ in gpus) * MIB,
        COMPUTE_CAPABILITY: min(float(capability) for _, capability in gpus),
    }


def facts_of_accelerator(resources: Mapping[str, float]) -> dict[str, float]:
    """Look up the accelerator that is named among a node's resources; nothing for an unknown one."""
    for name in resources:
        if name.startswith(_PREFIX) and name.removeprefix(_PREFIX) in ACCELERATORS:
            num_mib, capability = ACCELERATORS[name.removeprefix(_PREFIX)]
            return {GPU_BYTES: num_mib * MIB, COMPUTE_CAPABILITY: capability}
    return {}


def gpu_facts(node: Mapping[str, Any]) -> dict[str, float]:
    """Ask a node of the connected cluster, an entry of `ray.nodes()`, by a task that reserves nothing."""
    if node["Resources"].get("GPU", 0) <= 0:
        return {}
    import ray
    from ray.exceptions import RayError
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
    task = ray.remote(num_cpus=0, scheduling_strategy=here)(facts_of_this_machine)  # type: ignore[arg-type]
    try:
        answer: dict[str, float] = ray.get(task.remote(), timeout=TIMEOUT_S)
    except RayError as error:  # a timeout is one too
        logger.debug("node %s does not tell its GPUs: %s", node["NodeID"], error)
        answer = {}
    return answer or facts_of_accelerator(node["Resources"])
