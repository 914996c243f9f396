"""A fleet on Ray's own autoscaler, whose nodes are processes of one machine: demand brings them, idleness ends them."""

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).parents[2]
CONFIG = {
    "cluster_name": "scaling",
    "max_workers": 2,
    "provider": {
        "type": "fake_multinode",
        "head_node_id": "f" * 51 + "00000",
        "use_node_id_as_ip": True,  # all nodes have one address
        "disable_node_updaters": True,
        "disable_launch_config_check": True,
    },
    "available_node_types": {
        "ray.head.default": {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0},
        "worker": {"resources": {"CPU": 1}, "node_config": {}, "min_workers": 0, "max_workers": 2},
    },
    "head_node_type": "ray.head.default",
    "upscaling_speed": 10.0,
    "idle_timeout_minutes": 0.1,
    "auth": {},
    "docker": {},
    "file_mounts": {},
    "file_mounts_sync_continuously": False,
} | {
    name: []
    for name in (
        *("initialization_commands", "setup_commands", "head_setup_commands", "worker_setup_commands"),
        *("head_start_ray_commands", "worker_start_ray_commands", "cluster_synced_files"),
        *("rsync_exclude", "rsync_filter"),
    )
}
DRIVER = """
import json, sys, time
from concurrent.futures import ThreadPoolExecutor
import ray
from rayrl.fleets.fleet import start_replicas
from rayrl.fleets.replicas import Replicas
from rayrl.algorithms.scaling import ScaleRule
from rayrl.preflight import find_cluster
from tests.fleets.test_scaling import Sleeper

ray.init(sys.argv[1], namespace="rayrl", log_to_driver=False)


def num_nodes():
    return sum(node["Alive"] for node in ray.nodes())


def state():
    return ray.get(fleet.router.state.remote())


def until(condition):
    deadline = time.monotonic() + 120
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.5)
    return condition()


found = find_cluster()
seen = {"has and may get": [found.has("CPU"), found.most("CPU")], "at first": num_nodes()}
replicas = Replicas(replica=Sleeper, spec="", options={"num_cpus": 1, "max_concurrency": 10})
fleet = start_replicas("f", replicas, 1, rule=ScaleRule(least=1, most=2, queue_s=1.0, idle_s=10.0))
fleet.wait_ready(120)
seen["with a replica"] = num_nodes()
with ThreadPoolExecutor(20) as calls:
    answers = [calls.submit(fleet.call, "work", [i], 5.0) for i in range(20)]
seen["asked"] = sorted(item for answer in answers for _, item in answer.result())
seen["under a queue"] = num_nodes()
seen["shrunk"] = until(lambda: (state()["ready"], state()["draining"]) == (1, 0))
seen["idle nodes went"] = until(lambda: num_nodes() == 2)
fleet.stop()
seen["all went"] = until(lambda: num_nodes() == 1)
print(json.dumps(seen))
"""


@pytest.fixture
def cluster(tmp_path):
    """The address of a head without CPUs, with an autoscaler, in a folder where no other Ray finds it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    temporary = tempfile.mkdtemp(prefix="rayrl-")  # short, for the names of sockets
    config = CONFIG | {"provider": CONFIG["provider"] | {"gcs_address": f"127.0.0.1:{port}"}}
    (tmp_path / "autoscaling.json").write_text(json.dumps(config))
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block"]
    command += [f"--port={port}", f"--temp-dir={temporary}", "--num-cpus=0", "--node-ip-address=127.0.0.1"]
    command += ["--include-dashboard=false", f"--autoscaling-config={tmp_path / 'autoscaling.json'}"]
    environment = os.environ | {
        "RAY_FAKE_CLUSTER": "1",
        "AUTOSCALER_UPDATE_INTERVAL_S": "1",
        "RAY_AUTH_MODE": "disabled",
    }
    with (tmp_path / "head.log").open("w") as log:
        head = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
    deadline = time.monotonic() + 60
    while "Ray runtime started" not in (tmp_path / "head.log").read_text():
        assert head.poll() is None and time.monotonic() < deadline, (tmp_path / "head.log").read_text()
        time.sleep(0.5)
    yield f"127.0.0.1:{port}"
    ours = psutil.Process(head.pid).children(recursive=True)
    head.terminate()
    head.wait(timeout=60)
    for process in ours:  # nodes that the autoscaler started outlive it
        if process.is_running():
            process.kill()
    shutil.rmtree(temporary, ignore_errors=True)


@pytest.mark.slow
def test_demand_brings_nodes_and_idle_ones_go(cluster, tmp_path):
    environment = os.environ | {"PYTHONPATH": str(ROOT), "RAY_AUTH_MODE": "disabled", "RAY_ADDRESS": cluster}
    environment |= {"RAYRL_AUTOSCALING_CONFIG": str(tmp_path / "autoscaling.json")}
    command = [sys.executable, "-c", DRIVER, cluster]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:] + (tmp_path / "head.log").read_text()[-3000:]
    assert json.loads(done.stdout.splitlines()[-1]) == {
        "has and may get": [0.0, 2.0],
        "at first": 1,
        "with a replica": 2,
        "asked": list(range(20)),
        "under a queue": 3,
        "shrunk": True,
        "idle nodes went": True,
        "all went": True,
    }
