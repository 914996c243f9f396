"""`ray job submit` to a real cluster with token authentication: a head without work and two worker nodes."""

import secrets
import urllib.error
from pathlib import Path

import pytest

from rayrl.fleets.local_cluster import LocalCluster, wait_until

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
SMALL = [
    "pool.limit=60",
    "pool.num_eval=12",
    "generate.k=3",
    "generate.block_size=16",
    "generate.max_tokens=32",
    "sft.enabled=false",
    "select.budget=24",
    "evaluator.epochs=2",
    "dpo.epochs=1",
    "evaluate.budget=24",
]
START_S, STOP_S, RUN_S = 90, 60, 420
STARTED = (
    "Generator",
    "Embedder",
    "OraclePool",
    "Router",
    "Control",
    "TrainController",
    "RayTrainWorker",
    "EngineCore",
)
"""Actors of a run, and the engines' own processes."""


@pytest.fixture(scope="module")
def cluster(network, tmp_path_factory):
    folder = tmp_path_factory.mktemp("cluster")
    token = folder / "token"
    token.write_text(secrets.token_hex(32))
    token.chmod(0o600)
    environment = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token)}
    with LocalCluster(folder, environment=environment, network=network, working_dir=ROOT) as cluster:
        yield cluster


def submit(cluster, name, *overrides):
    command = ["python", "jobs/proxy_dpo.py", "jobs/configs/quickstart.toml", *SMALL, *overrides]
    options = ["--no-wait", "--submission-id", name, "--working-dir", "."]
    said, code = cluster.ray("job", "submit", *options, "--", *command)
    assert code == 0 and f"Job '{name}' submitted successfully" in said, said


def logs(cluster, name):
    return cluster.ray("job", "logs", name)[0]


def status(cluster, name):
    said = cluster.ray("job", "status", name)[0].upper()
    return next((word for word in ("SUCCEEDED", "FAILED", "STOPPED", "RUNNING", "PENDING") if word in said), said)


def ended(cluster, name, seconds):
    """How a job ended."""
    over = ("SUCCEEDED", "FAILED", "STOPPED")
    return wait_until(lambda: (now := status(cluster, name)) in over and now, seconds, f"the end of job {name}")


def alive(cluster):
    """Kinds of processes of a run that live."""
    return [kind for kind in STARTED if cluster.actors(kind)]


def groups(cluster):
    """Placement groups that hold something."""
    return "CREATED" in cluster.ray("list", "placement-groups", "--filter", "state=CREATED")[0]


def test_a_stopped_job_leaves_nothing_and_the_same_command_goes_on(cluster, tmp_path):
    folder = tmp_path / "run"
    submit(cluster, "first", f"run_dir={folder}")
    generated = folder / "stages" / "generate" / "manifest.json"
    wait_until(lambda: generated.exists() or status(cluster, "first") == "FAILED", RUN_S, "the first job's generation")
    assert generated.exists(), logs(cluster, "first")
    assert status(cluster, "first") == "RUNNING" and {"Generator", "OraclePool", "Router"} <= set(alive(cluster))
    said, code = cluster.ray("job", "stop", "first")
    assert code == 0, said
    assert ended(cluster, "first", STOP_S) == "STOPPED"
    wait_until(lambda: not alive(cluster) and not groups(cluster), STOP_S, "the end of what the job has started")

    written_at = generated.stat().st_mtime_ns
    submit(cluster, "second", f"run_dir={folder}")
    assert ended(cluster, "second", RUN_S) == "SUCCEEDED", logs(cluster, "second")
    said = logs(cluster, "second")
    assert generated.stat().st_mtime_ns == written_at and "generate: already finished" in said
    assert f"report: {folder}/report.html" in said and " dpo: " in said
    assert (folder / "report.html").stat().st_size > 10_000
    wait_until(lambda: not alive(cluster) and not groups(cluster), STOP_S, "the end of what the second job has started")


def test_a_relative_run_directory_fails_and_the_log_says_why(cluster):
    submit(cluster, "relative", "run_dir=runs/x")
    assert ended(cluster, "relative", START_S) == "FAILED"
    assert "error: run_dir must be an absolute path" in logs(cluster, "relative")


def test_who_has_no_token_learns_and_starts_nothing(cluster):
    with pytest.raises(urllib.error.HTTPError) as refused:
        cluster.get("/api/jobs/", token=False)
    assert refused.value.code == 401
    said, code = cluster.ray("job", "list", RAY_AUTH_MODE="disabled")
    assert (code != 0 and "401" in said) or "token" in said.lower()
    with open(cluster.environment["RAY_AUTH_TOKEN_PATH"]) as token:
        assert token.read() not in cluster.ray("job", "list")[0]
