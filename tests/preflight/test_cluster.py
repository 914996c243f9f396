"""Needs of a run against the resources that a cluster has and may grow to; no Ray runs here."""

import json
import math
from pathlib import Path

import pytest
import yaml

from rayrl.config import load_config
from rayrl.errors import ConfigError, ResourceError
from rayrl.preflight import Cluster, check, render_plan
from rayrl.preflight.autoscaling import SETTING, find_node_types, growth_of, growth_of_kuberay
from rayrl.preflight.cluster import HEAD, NodeType
from tests.preflight.trees import TWO_CPUS, changed, grow, refusal, save_model

KUBERAY = Path(__file__).parents[2] / "cluster" / "kuberay"
WORKER = {"CPU": 8.0, "GPU": 2.0}


def growing(*kinds, head=None, workers=(), most_workers=math.inf):
    """A cluster of a head and workers to which these (resources, most) may be added."""
    node_types = tuple(NodeType(resources=resources, most=most) for resources, most in kinds)
    head = {HEAD: 1.0, **(head or {"CPU": 0.0})}
    return Cluster(nodes=(head, *workers), node_types=node_types, most_workers=most_workers)


def test_a_cluster_that_grows_from_nothing_is_large_enough(tree):
    plan = check(changed(tree), cluster=growing((WORKER, 3)))
    assert plan.on_gpu
    assert "\ncluster  has 0 CPU, 0 GPU; may grow to 24 CPU, 6 GPU\n" in render_plan(plan)
    assert "\ncluster  has 2 CPU, 0 GPU\n" in render_plan(check(changed(tree), cluster=TWO_CPUS))
    assert not check(changed(tree), cluster=growing(({"CPU": 4.0}, 2))).on_gpu


def test_a_cluster_that_cannot_grow_enough_is_refused(tree):
    config = changed(tree, generators__num_replicas=7)
    message = refusal(ResourceError, config, growing((WORKER, 3), workers=[WORKER]))
    assert message.startswith(
        "stage generate (7 generator(s)) needs GPU: 7, and the cluster has 2 and may grow to 6; lower generators.num_"
    )
    unseen = Cluster(nodes=({"CPU": 0.0},), remark="if it grows by itself, say so")
    message = refusal(ResourceError, changed(tree), unseen)
    assert "needs CPU: 0 and 1 free for Ray Data, and the cluster has 0;" in message
    assert message.endswith("; use a larger machine or cluster; if it grows by itself, say so")


def test_workers_that_are_there_are_not_counted_twice():
    cluster = growing((WORKER, 3), head={"CPU": 4.0}, workers=[WORKER, WORKER])
    assert (cluster.has("CPU"), cluster.most("CPU"), cluster.most("GPU")) == (20.0, 28.0, 6.0)
    foreign = growing((WORKER, 1), workers=[WORKER, WORKER, WORKER])  # started by hand
    assert foreign.most("GPU") == 6.0


def test_the_limit_of_all_workers_together_holds():
    cluster = growing(({"CPU": 64.0}, 4), (WORKER, 4), most_workers=5)
    assert (cluster.most("CPU"), cluster.most("GPU")) == (4 * 64.0 + 8.0, 8.0)
    endless = growing(({"CPU": 1.0}, math.inf), (WORKER, 2))
    assert endless.most("CPU") == math.inf and endless.most("GPU") == 4.0
    assert endless.describe("CPU") == "0 and may grow to any number"
    assert growing((WORKER, 0)).most("GPU") == 0.0 == growing((WORKER, 0)).largest("GPU")


def test_a_replica_of_several_gpus_needs_them_on_one_node(tree, tmp_path):
    four_heads = save_model(tmp_path / "four", num_attention_heads=4)
    config = changed(tree, policy__path=four_heads, generators__tensor_parallel_size=4)
    pairs = Cluster(nodes=(WORKER, WORKER, WORKER))
    message = refusal(ResourceError, config, pairs)
    assert (
        "stage generate (1 generator(s)) needs GPU: 4 on one node, and the largest that there is, or may be, has"
        in message
    )
    # More nodes of the same kind cannot help.
    lower = "lower generators.tensor_parallel_size or generators.pipeline_parallel_size"
    assert message.endswith(f"has 2; {lower}, or use larger nodes")
    larger = {"CPU": 8.0, "GPU": 4.0}
    check(config, cluster=Cluster(nodes=(WORKER, larger, larger)))
    check(config, cluster=growing((larger, 2), workers=[WORKER]))


def test_a_replica_of_several_cpus_needs_them_on_one_node(tree):
    config = changed(tree, embedders__cpus_per_replica=6.0)
    message = refusal(ResourceError, config, Cluster(nodes=({"CPU": 4.0},) * 4))
    assert (
        "stage select (1 embedder(s)) needs CPU: 6 on one node" in message and "embedders.cpus_per_replica" in message
    )
    check(config, cluster=Cluster(nodes=({"CPU": 8.0},) * 2))


def test_processes_that_no_memory_holds_are_refused(tree):
    grow(Path(tree["policy"]["path"]), 2**30)
    tree |= {"generators": {"num_replicas": 4}}
    small = {"CPU": 2.0, "memory": 4.0 * 2**30, "object_store_memory": 0.4 * 2**30}
    message = refusal(ResourceError, changed(tree), Cluster(nodes=(small,)))
    assert message.startswith(
        "stage generate (4 generator(s)) needs memory: about 4.6 GiB (4 x generators: weights 1.0, activations 0.0, kv"
    )
    assert message.endswith("has, or may get, 4.4 GiB; lower generators.num_replicas, or use a larger cluster")
    adapters = {"policy__dtype": "bfloat16", "evaluator__lora": {}, "dpo__lora": {}}
    check(changed(tree, **adapters), cluster=Cluster(nodes=(small | {"CPU": 9.0},)))
    check(changed(tree), cluster=Cluster(nodes=(small, small)))
    check(changed(tree), cluster=Cluster(nodes=(small, {"CPU": 2.0})))  # a node that does not say what it has
    check(changed(tree, policy__dtype="float32"), cluster=Cluster(nodes=(small | {"GPU": 9.0},)))


def test_an_autoscalers_config_says_what_may_come(tmp_path, monkeypatch):
    config = {
        "max_workers": 6,
        "head_node_type": "head",
        "available_node_types": {
            "head": {"resources": {"CPU": 0}, "node_config": {}},
            "cpu": {"resources": {"CPU": 8}, "max_workers": 4},
            "gpu": {"resources": {"CPU": 16, "GPU": 8}},
        },
    }
    growth = growth_of(config)
    cluster = Cluster(nodes=(), node_types=growth.node_types, most_workers=growth.most_workers)
    assert (cluster.most("CPU"), cluster.most("GPU")) == (96, 48)
    (tmp_path / "autoscaling.yaml").write_text(yaml.safe_dump(config))
    monkeypatch.setenv(SETTING, str(tmp_path / "autoscaling.yaml"))
    assert find_node_types() == growth
    for content in (json.dumps({"max_workers": 6}), "- 1", "{"):
        (tmp_path / "autoscaling.yaml").write_text(content)
        with pytest.raises(ConfigError, match=f"{SETTING} must name the autoscaler's config, a YAML file with avail"):
            find_node_types()


def test_a_bad_file_of_ray_up_is_not_blamed_on_a_setting_that_nobody_made(tmp_path, monkeypatch):
    for name in (SETTING, "RAY_CLUSTER_NAME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("rayrl.preflight.autoscaling._read_platform", lambda: None)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert find_node_types() is None
    (tmp_path / "ray_bootstrap_config.yaml").write_text("- 1")
    with pytest.raises(ConfigError) as refused:
        find_node_types()
    message = str(refused.value)
    assert message.startswith("the file that `ray up` leaves must be the autoscaler's config, a YAML file with avail")
    assert "got ~/ray_bootstrap_config.yaml: " in message and message.endswith(f"; set {SETTING} to a correct one")


@pytest.mark.parametrize(("file", "kind"), [("raycluster.yaml", "RayCluster"), ("rayjob.yaml", "RayJob")])
def test_our_kubernetes_clusters_say_what_may_come(file, kind):
    documents = yaml.safe_load_all((KUBERAY / file).read_text())
    resource = next(document for document in documents if document["kind"] == kind)
    spec = resource["spec"] if kind == "RayCluster" else resource["spec"]["rayClusterSpec"]
    resource = {"metadata": {"name": "rayrl", "namespace": "rayrl"}, "spec": spec}
    growth = growth_of_kuberay(resource)
    groups = {group["groupName"]: group for group in spec["workerGroupSpecs"]}
    assert len(growth.node_types) == len(groups)
    cluster = Cluster(nodes=(), node_types=growth.node_types, most_workers=growth.most_workers)
    assert cluster.most("GPU") == 8 * groups["gpu"]["maxReplicas"] and cluster.largest("GPU") == 8
    assert growth_of_kuberay(resource | {"spec": spec | {"enableInTreeAutoscaling": False}}).node_types == ()


@pytest.mark.parametrize("file", ["raycluster.yaml", "rayjob.yaml"])
def test_the_first_run_on_kubernetes_asks_for_no_gpu(file, tmp_path):
    """The group of GPUs may grow, and is not waited for: the documented first run is on CPUs."""
    documents = list(yaml.safe_load_all((KUBERAY / file).read_text()))
    (document,) = [document for document in documents if document["kind"] in ("RayCluster", "RayJob")]
    spec = document["spec"].get("rayClusterSpec", document["spec"])
    growth = growth_of_kuberay({"metadata": {"name": "rayrl", "namespace": "rayrl"}, "spec": spec})
    cluster = Cluster(nodes=({HEAD: 1.0, "CPU": 0.0},), node_types=growth.node_types, most_workers=growth.most_workers)
    entrypoint = yaml.safe_load_all((KUBERAY / "rayjob.yaml").read_text())
    command = next(job["spec"]["entrypoint"] for job in entrypoint if job["kind"] == "RayJob").split()
    config = load_config(KUBERAY.parents[1] / command[2], [*command[3:], f"run_dir={tmp_path / 'run'}"])
    plan = check(config, cluster=cluster)
    assert cluster.most("GPU") > 0 and not plan.on_gpu
    assert not any(stage.num_gpus for stage in plan.stages)
