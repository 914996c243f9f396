"""What a cluster's autoscaler may add, from whoever can say.

Ray has no public call for it. What Ray Train and Ray Data ask (`ray._private.state`) is a record that the open-source
autoscalers of Ray 2.60 do not write: it is there on managed platforms only. Elsewhere the autoscaler's own config is
read, which has one form for all of them:

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
    """What the autoscaler of the connected cluster may add; None if nobody here can say.

    Raises:
        ConfigError: RAYRL_AUTOSCALING_CONFIG names no such file.
    """
    if named := os.environ.get(SETTING):
        return _of_file(named)
    found = _reported() or _of_kuberay()
    if found is None and Path(BOOTSTRAP).expanduser().exists():
        return _of_file(BOOTSTRAP)
    return found


def growth_of(config: Mapping[str, Any]) -> Growth:
    """What an autoscaler with this config (the form of `ray up`'s file) may add."""
    most = config.get("max_workers", math.inf)
    head = config.get("head_node_type")
    kinds = {
        name: NodeType(resources=kind.get("resources") or {}, most=kind.get("max_workers", 0 if name == head else most))
        for name, kind in config["available_node_types"].items()
    }
    return Growth(node_types=tuple(kind for kind in kinds.values() if kind.most > 0), most_workers=most)


def growth_of_kuberay(resource: Mapping[str, Any]) -> Growth:
    """What KubeRay's autoscaler may add to a RayCluster, given as its resource."""
    if not resource["spec"].get("enableInTreeAutoscaling"):
        return Growth(node_types=())
    from ray.autoscaler._private.kuberay import autoscaling_config

    return growth_of(autoscaling_config._derive_autoscaling_config_from_ray_cr(dict(resource)))


def _of_file(path: str) -> Growth:
    import yaml

    try:
        return growth_of(yaml.safe_load(Path(path).expanduser().read_text()))
    except (OSError, yaml.YAMLError, AttributeError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{SETTING} must name the autoscaler's config, a YAML file with available_node_types, got {path}: "
            f"{error!r}; correct it, or unset it"
        ) from None


def _reported() -> Growth | None:
    """What a managed platform's autoscaler has told Ray."""
    from ray._private.state import state

    config = state.get_cluster_config()
    if config is None or not config.node_group_configs:
        return None
    kinds = (
        NodeType(resources=dict(kind.resources), most=math.inf if kind.max_count < 0 else kind.max_count)
        for kind in config.node_group_configs
    )
    return Growth(node_types=tuple(kinds))


def _of_kuberay() -> Growth | None:
    """What the resource of this pod's RayCluster says; None outside Kubernetes and where the pod may not read it."""
    name, namespace = os.environ.get("RAY_CLUSTER_NAME"), _SERVICE_ACCOUNT / "namespace"
    if not name or not namespace.exists():
        return None
    from ray.autoscaler._private.kuberay.node_provider import KubernetesHttpApiClient

    try:
        return growth_of_kuberay(KubernetesHttpApiClient(namespace.read_text()).get(f"rayclusters/{name}"))
    except (OSError, KeyError, ValueError) as error:  # requests' errors are OSErrors
        logger.warning("what the autoscaler may add is not known: the RayCluster %s cannot be read (%s)", name, error)
        return None
