"""Limits of a cluster's autoscaler: the kinds of node it may add, and how many.

Ray has no public call for it. What Ray Train and Ray Data ask (`ray._private.state`) is a record that the open-source
autoscalers of Ray 2.60 do not write: only managed platforms have it. Elsewhere the autoscaler's own config is read,
which has one form for all of them:

* `RAYRL_AUTOSCALING_CONFIG` names the file that `ray start --head --autoscaling-config=FILE` was given;
* on Kubernetes it follows from the RayCluster resource, which the head's pod may read: its autoscaler does the same;
* `ray up` leaves it in the home folder of the head, where drivers of submitted jobs run.
"""

import logging
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rayrl.errors import ConfigError
from rayrl.preflight.cluster import NodeType

logger = logging.getLogger(__name__)

SETTING = "RAYRL_AUTOSCALING_CONFIG"
BOOTSTRAP = "~/ray_bootstrap_config.yaml"
_SERVICE_ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")


@dataclass(frozen=True, kw_only=True)
class Growth:
    """The kinds of node an autoscaler may add; none if there is no autoscaler."""

    node_types: tuple[NodeType, ...]
    most_workers: float = math.inf


def find_node_types() -> Growth | None:
    """Find the limits of the connected cluster's autoscaler; None if they cannot be found out from here.

    Raises:
        ConfigError: the file that RAYRL_AUTOSCALING_CONFIG names, or the one that `ray up` has left, is no such file.
    """
    if named := os.environ.get(SETTING):
        return _read_file(named, f"{SETTING} must name", "correct it, or unset it")
    found = _read_platform() or _read_kuberay()
    if found is None and Path(BOOTSTRAP).expanduser().exists():
        return _read_file(BOOTSTRAP, "the file that `ray up` leaves must be", f"set {SETTING} to a correct one")
    return found


def growth_of(config: Mapping[str, Any]) -> Growth:
    """Limits in an autoscaler's config, which has the form of the file that `ray up` takes."""
    most_workers = config.get("max_workers", math.inf)
    head = config.get("head_node_type")
    node_types = []
    for name, kind in config["available_node_types"].items():
        # Like Ray's autoscaler: a worker's kind without a limit of its own has the cluster's, the head's has none.
        default = 0 if name == head else most_workers
        node_type = NodeType(resources=kind.get("resources") or {}, most=kind.get("max_workers", default))
        if node_type.most > 0:
            node_types.append(node_type)
    return Growth(node_types=tuple(node_types), most_workers=most_workers)


def growth_of_kuberay(resource: Mapping[str, Any]) -> Growth:
    """Limits of KubeRay's autoscaler for a RayCluster, given as its resource."""
    if not resource["spec"].get("enableInTreeAutoscaling"):
        return Growth(node_types=())
    from ray.autoscaler._private.kuberay import autoscaling_config

    # Private, but it is the very translation that the autoscaler beside the head makes of the resource.
    return growth_of(autoscaling_config._derive_autoscaling_config_from_ray_cr(dict(resource)))


def _read_file(path: str, rule: str, remedy: str) -> Growth:
    """Read the limits in a file of the autoscaler.

    Args:
        path: of the file.
        rule: begins the message that refuses it: what must be the autoscaler's config.
        remedy: ends that message.
    """
    import yaml

    try:
        return growth_of(yaml.safe_load(Path(path).expanduser().read_text()))
    except (OSError, yaml.YAMLError, AttributeError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{rule} the autoscaler's config, a YAML file with available_node_types, got {path}: {error!r}; {remedy}"
        ) from None


def _read_platform() -> Growth | None:
    """Limits that a managed platform's autoscaler has recorded in Ray; None without such a record."""
    from ray._private.state import state

    config = state.get_cluster_config()
    if config is None or not config.node_group_configs:
        return None
    node_types = []
    for group in config.node_group_configs:
        # The record has -1 for a group without a limit.
        most = math.inf if group.max_count < 0 else group.max_count
        node_types.append(NodeType(resources=dict(group.resources), most=most))
    return Growth(node_types=tuple(node_types))


def _read_kuberay() -> Growth | None:
    """Limits in the resource of this pod's RayCluster; None outside Kubernetes and where the pod may not read it."""
    name, namespace = os.environ.get("RAY_CLUSTER_NAME"), _SERVICE_ACCOUNT / "namespace"
    if not name or not namespace.exists():
        return None
    from ray.autoscaler._private.kuberay.node_provider import KubernetesHttpApiClient

    try:
        return growth_of_kuberay(KubernetesHttpApiClient(namespace.read_text()).get(f"rayclusters/{name}"))
    except (OSError, KeyError, ValueError) as error:  # requests' errors are OSErrors
        logger.warning("what the autoscaler may add is not known: the RayCluster %s cannot be read (%s)", name, error)
        return None
