"""`ray job submit` to a real cluster with token authentication: a head without work and two worker raylets."""

import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).parents[2]
RAY = [sys.executable, "-m", "ray.scripts.scripts"]
SMALL = [
    "pool.limit=60",
    "pool.num_eval=12",
    "generate.k=3",
    "generate.block_size=16",
    "generate.max_tokens=32",
    "sft.batch_size=64",
    "select.budget=24",
    "evaluator.epochs=2",
    "dpo.epochs=1",
    "evaluate.budget=24",
]
START_S, STOP_S, RUN_S = 90, 60, 420


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def until(condition, seconds, what):
    """The first true value of `condition`, looked at twice a second."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, f"waited {seconds} s for {what}"
        time.sleep(0.5)
    return value


class Cluster:
    """Raylets of one cluster, each a process of ours, and Ray's job commands against it."""

    def __init__(self, folder):
        self.folder = folder
        self.token = folder / "token"
        self.token.write_text(secrets.token_hex(32))
        self.token.chmod(0o600)
        self.gcs, self.dashboard = f"127.0.0.1:{free_port()}", f"http://127.0.0.1:{free_port()}"
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        unset = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        self.environment = unset | {
            "PATH": path,
            "HF_HUB_OFFLINE": "1",
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(self.token),
            "RAY_API_SERVER_ADDRESS": self.dashboard,
        }
        port, http = self.gcs.rpartition(":")[2], self.dashboard.rpartition(":")[2]
        self._raylets = [
            self._start("--head", f"--port={port}", "--num-cpus=0", "--dashboard-host=127.0.0.1",
                        f"--dashboard-port={http}", f"--temp-dir={tempfile.mkdtemp(prefix='ray-')}")
        ]  # fmt: skip
        until(self._answers, START_S, "the job API")
        self._raylets += [self._start(f"--address={self.gcs}", "--num-cpus=2") for _ in range(2)]

    def _start(self, *arguments):
        output = (self.folder / f"raylet{len(list(self.folder.glob('raylet*')))}").open("w")
        command = [*RAY, "start", "--block", "--disable-usage-stats"]
        return subprocess.Popen(
            [*command, *arguments], env=self.environment, stdout=output, stderr=output, start_new_session=True
        )

    def _answers(self):
        assert self._raylets[0].poll() is None, (self.folder / "raylet0").read_text()
        try:
            return self.get("/api/version")
        except (urllib.error.URLError, ConnectionError):
            return None

    def get(self, path, *, token=True):
        headers = {"Authorization": f"Bearer {self.token.read_text()}"} if token else {}
        request = urllib.request.Request(self.dashboard + path, headers=headers)
        with urllib.request.urlopen(request, timeout=10) as answer:
            return answer.read()

    def ray(self, *arguments, **changed):
        """Output and exit code of one of Ray's commands."""
        done = subprocess.run(
            [*RAY, *arguments],
            env=self.environment | changed, cwd=ROOT, capture_output=True, text=True, timeout=120,
        )  # fmt: skip
        return done.stdout + done.stderr, done.returncode

    def submit(self, name, *overrides):
        command = ["python", "jobs/proxy_dpo.py", "jobs/configs/quickstart.toml", *SMALL, *overrides]
        said, code = self.ray(
            "job", "submit", "--no-wait", "--submission-id", name, "--working-dir", ".", "--", *command
        )
        assert code == 0 and f"Job '{name}' submitted successfully" in said, said

    def logs(self, name):
        return self.ray("job", "logs", name)[0]

    def status(self, name):
        said, _ = self.ray("job", "status", name)
        return next((word for word in ("SUCCEEDED", "FAILED", "STOPPED", "RUNNING", "PENDING") if word in said), said)

    def ended(self, name, seconds):
        return until(
            lambda: (s := self.status(name)) in ("SUCCEEDED", "FAILED", "STOPPED") and s, seconds, f"job {name}"
        )

    def alive(self):
        """Living actors of the jobs, placement groups, and engines' processes."""
        actors = self.ray("list", "actors", "--filter", "state=ALIVE", "--limit", "500")[0]
        groups = self.ray("list", "placement-groups", "--filter", "state=CREATED")[0]
        names = ("generators", "embedders", "oracle", "TrainController", "RayTrainWorker")
        mine = [p for raylet in self._raylets for p in psutil.Process(raylet.pid).children(recursive=True)]
        engines = [p for p in mine if "VLLM" in " ".join(cmdline(p))]
        return [n for n in names if n in actors], "CREATED" in groups, [p.pid for p in engines]

    def stop(self):
        for raylet in reversed(self._raylets):
            os.kill(raylet.pid, signal.SIGTERM)
        for raylet in self._raylets:
            try:
                raylet.wait(STOP_S)
            except subprocess.TimeoutExpired:
                os.killpg(raylet.pid, signal.SIGKILL)


def cmdline(process):
    try:
        return process.cmdline()
    except psutil.Error:
        return []


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    started = Cluster(tmp_path_factory.mktemp("cluster"))
    yield started
    started.stop()


def test_a_stopped_job_leaves_nothing_and_the_same_command_goes_on(cluster, tmp_path):
    folder = tmp_path / "run"
    cluster.submit("first", f"run_dir={folder}")
    generated = folder / "stages" / "generate" / "manifest.json"
    until(generated.exists, RUN_S, "the first job's generation")
    assert cluster.status("first") == "RUNNING" and cluster.alive()[0]
    said, code = cluster.ray("job", "stop", "first")
    assert code == 0, said
    assert cluster.ended("first", STOP_S) == "STOPPED"
    until(lambda: cluster.alive() == ([], False, []), STOP_S, f"the end of what the job started: {cluster.alive()}")

    written_at = generated.stat().st_mtime_ns
    cluster.submit("second", f"run_dir={folder}")
    assert cluster.ended("second", RUN_S) == "SUCCEEDED", cluster.logs("second")
    said = cluster.logs("second")
    assert generated.stat().st_mtime_ns == written_at and " generate: " not in said
    assert f"report: {folder}/report.html" in said and " dpo: " in said
    assert (folder / "report.html").stat().st_size > 10_000
    until(lambda: cluster.alive() == ([], False, []), STOP_S, f"the end of the second job: {cluster.alive()}")


def test_a_relative_run_directory_fails_and_the_log_says_why(cluster):
    cluster.submit("relative", "run_dir=runs/x")
    assert cluster.ended("relative", START_S) == "FAILED"
    assert "error: run_dir must be an absolute path" in cluster.logs("relative")


def test_who_has_no_token_learns_and_starts_nothing(cluster):
    with pytest.raises(urllib.error.HTTPError) as refused:
        cluster.get("/api/jobs/", token=False)
    assert refused.value.code == 401
    said, code = cluster.ray("job", "list", RAY_AUTH_MODE="disabled")
    assert (code != 0 and "401" in said) or "token" in said.lower()
    assert cluster.token.read_text() not in cluster.ray("job", "list")[0]
