"""A real cluster with a dashboard, a Prometheus that scrapes it, and two small runs on it."""

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
SCRAPE_S = 2
LAST_EXPORT_S = 25.0
"""Ray exports every 10 s; what a run's last second measured is there after two of them and a scrape."""
START_S = 120.0
RUN_S = 900.0
CHROMIUMS = ("chromium", "chromium-browser", "google-chrome")
LABELLING = ["pool.limit=60", "pool.num_eval=12", "generate.block_size=16", "select.budget=24", "evaluate.budget=24"]
LABELLING += ["evaluator.epochs=4", "dpo.epochs=1", "sft.batch_size=64"]
PPO = ["pool.limit=60", "pool.num_eval=12", "generate.block_size=16", "generate.max_tokens=24", "select.budget=40"]
PPO += ["sft.enabled=false", "reward_model.epochs=1", "ppo.rollout_size=16", "ppo.batch_size=8", "ppo.max_rollouts=2"]
PPO += ["ppo.evaluate_every=1", "refresh.num_prompts=32", "evaluate.budget=48"]
RUNS = (("proxy_dpo", "quickstart", LABELLING), ("rlp", "rlp_quickstart", PPO))


@dataclass(frozen=True, kw_only=True)
class Watched:
    """Where everything is, and when the runs began and were over (Unix time)."""

    dashboard: str
    prometheus: str
    chromium: str
    began: float
    over: float

    def series(self, query: str) -> list[dict]:
        """The series of a query over the whole time, every scrape.

        Raises:
            urllib.error.HTTPError: Prometheus refuses the query.
        """
        asked = {"query": query, "start": self.began, "end": self.over, "step": 5}
        answer = read(f"{self.prometheus}/api/v1/query_range?{urllib.parse.urlencode(asked)}")
        assert answer["status"] == "success", answer
        return answer["data"]["result"]

    def names(self) -> set[str]:
        """Of all metrics that Prometheus has seen."""
        return set(read(f"{self.prometheus}/api/v1/label/__name__/values")["data"])


def tool(*names: str) -> str:
    """The first of some commands that is there.

    Raises:
        FileNotFoundError: none is.
    """
    for name in names:
        if found := shutil.which(name):
            return found
    raise FileNotFoundError(f"make test-dashboard needs {names[0]}: run `make dashboard-tools`, or install it")


def read(url: str) -> dict:
    with urllib.request.urlopen(url, timeout=30) as answer:
        return json.load(answer)


def free_port() -> int:
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        return bound.getsockname()[1]


@contextlib.contextmanager
def process(command: list[str], log: Path, **options) -> Iterator[subprocess.Popen]:
    """A process of its own group, ended with all its children."""
    with log.open("wb") as out:
        running = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, start_new_session=True, **options)
    try:
        yield running
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(running.pid, signal.SIGTERM)
        try:
            running.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(running.pid, signal.SIGKILL)
            running.wait()


def wait_for(url: str, log: Path) -> None:
    until = time.monotonic() + START_S
    while time.monotonic() < until:
        with contextlib.suppress(OSError):
            urllib.request.urlopen(url, timeout=5).close()
            return
        time.sleep(0.5)
    raise TimeoutError(f"no answer from {url} in {START_S:.0f} s:\n{log.read_text()[-2000:]}")


@contextlib.contextmanager
def watched(folder: Path) -> Iterator[Watched]:
    """Start everything, do the runs, and keep the cluster and the Prometheus for the tests."""
    prometheus, chromium = tool("prometheus"), tool(*CHROMIUMS)
    gcs, dashboard, metrics = free_port(), free_port(), free_port()
    environment = {**os.environ, "RAY_AUTH_MODE": "disabled", "HF_HUB_OFFLINE": "1"}
    with contextlib.ExitStack() as stack:
        temporary = stack.enter_context(tempfile.TemporaryDirectory(prefix="rayrl-", ignore_cleanup_errors=True))
        head = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--disable-usage-stats"]
        head += ["--num-cpus=4", f"--port={gcs}", f"--temp-dir={temporary}", "--node-ip-address=127.0.0.1"]
        head += ["--include-dashboard=true", "--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}"]
        stack.enter_context(process(head, folder / "ray.log", env=environment, cwd=ROOT))
        wait_for(f"http://127.0.0.1:{dashboard}/api/version", folder / "ray.log")
        agents = [{"files": [f"{temporary}/prom_metrics_service_discovery.json"]}]
        scrape = {"job_name": "ray", "file_sd_configs": agents}
        config = {"global": {"scrape_interval": f"{SCRAPE_S}s"}, "scrape_configs": [scrape]}
        (folder / "prometheus.yml").write_text(json.dumps(config))  # JSON is YAML
        scraper = [prometheus, f"--config.file={folder}/prometheus.yml", f"--storage.tsdb.path={folder}/tsdb"]
        scraper += [f"--web.listen-address=127.0.0.1:{metrics}"]
        stack.enter_context(process(scraper, folder / "prometheus.log"))
        wait_for(f"http://127.0.0.1:{metrics}/-/ready", folder / "prometheus.log")
        began = time.time()
        for job, config_name, settings in RUNS:
            command = [sys.executable, f"jobs/{job}.py", f"jobs/configs/{config_name}.toml", *settings]
            command += [f"name=watched-{job}", f"run_dir={folder}/{job}"]
            address = {"RAY_ADDRESS": f"127.0.0.1:{gcs}"}
            with process(command, folder / f"{job}.log", env=environment | address, cwd=ROOT) as running:
                assert running.wait(RUN_S) == 0, (folder / f"{job}.log").read_text()[-3000:]
        time.sleep(LAST_EXPORT_S)
        yield Watched(
            dashboard=f"http://127.0.0.1:{dashboard}",
            prometheus=f"http://127.0.0.1:{metrics}",
            chromium=chromium,
            began=began,
            over=time.time(),
        )
