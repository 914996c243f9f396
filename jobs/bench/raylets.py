"""A cluster of several nodes on this machine: a head without work and workers, each a raylet with processes of its own.

Where rayrl's faults are put to the test, and the time it takes to recover from them. A node that is killed dies as
machines do: all of its processes at once, and nobody is told.
"""

import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar

import psutil

from jobs.bench.hosts import Host, Network

ROOT = Path(__file__).parents[2]
RAY = [sys.executable, "-m", "ray.scripts.scripts"]
START_S = 90.0
STOP_S = 30.0
SETTINGS = {
    "RAY_health_check_initial_delay_ms": "2000",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "2000",
    "RAY_idle_worker_killing_time_threshold_ms": "600000",
}
"""Ray's: a lost node is noticed after some five seconds, a silent one after fifteen, not after a minute; and processes,
which are what costs most on few cores, are kept.
"""

T = TypeVar("T")


def until(condition: Callable[[], T], seconds: float, what: str) -> T:
    """The first true value of `condition`.

    Raises:
        TimeoutError: none in time; says what was waited for.
    """
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        if time.monotonic() > deadline:
            raise TimeoutError(f"waited {seconds:.0f} s for {what}")
        time.sleep(0.1)
    return value


def free_port() -> int:
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        return bound.getsockname()[1]


class Raylets:
    """A running cluster; use it as a context manager.

    Args:
        folder: for the nodes' output.
        num_workers: worker nodes.
        num_cpus: of each of them.
        environment: what the nodes' processes, and `environment`, have besides this process's own.
        network: where each worker node has a host of its own; without it all nodes are this one.
    """

    def __init__(
        self,
        folder: Path,
        *,
        num_workers: int = 2,
        num_cpus: int = 2,
        environment: dict[str, str] | None = None,
        network: Network | None = None,
    ):
        self.folder = folder
        ports = free_port(), free_port()
        self.address = f"{network.address if network else '127.0.0.1'}:{ports[0]}"
        self.dashboard = f"http://127.0.0.1:{ports[1]}"
        own = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        self.environment = own | {
            "RAY_AUTH_MODE": "disabled",
            "RAY_API_SERVER_ADDRESS": self.dashboard,
            "RAY_worker_niceness": "0",
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
            "PYTHONPATH": str(ROOT),
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            **SETTINGS,
            **({"GLOO_SOCKET_IFNAME": "eth0"} if network else {}),  # the name of this machine is not theirs
            **(environment or {}),
        }
        self._num_workers, self._num_cpus = num_workers, num_cpus
        self._network, self._hosts = network, dict[int, Host]()
        self._temporary = tempfile.mkdtemp(prefix="rayrl-")  # short, for the names of sockets
        self._nodes: list[psutil.Popen] = []
        self._head = ["--head", f"--port={ports[0]}", "--num-cpus=0", f"--temp-dir={self._temporary}"]
        self._head += ["--dashboard-host=127.0.0.1", f"--dashboard-port={ports[1]}"]
        self._head += [f"--node-ip-address={network.address}"] if network else []

    def __enter__(self) -> "Raylets":
        try:
            self.head = self._start(*self._head)
            until(self._answers, START_S, "the head's dashboard")
            for _ in range(self._num_workers):  # in turn: nodes of one address that start at once disturb each other
                self.add()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for node in reversed(self._nodes):
            self.kill(node)
        shutil.rmtree(self._temporary, ignore_errors=True)

    @property
    def workers(self) -> list[psutil.Popen]:
        """The worker nodes that live, the oldest first."""
        return [node for node in self._nodes if node is not self.head]

    def add(self, **environment: str) -> psutil.Popen:
        """One more worker node, with this in its environment; returns when its raylet has joined."""
        # A folder of its own, as on a machine of its own: in a shared one a node removes what a job's driver runs in.
        arguments = [f"--temp-dir={self._temporary}/{len(list(Path(self._temporary).iterdir()))}"]
        arguments += [f"--address={self.address}", f"--num-cpus={self._num_cpus}"]
        host = self._network.add() if self._network else None
        arguments += [f"--node-ip-address={host.address}"] if host else []
        node = self._start(*arguments, environment=environment, prefix=host.enter if host else ())
        if host:
            self._hosts[node.pid] = host
        said = self.folder / f"node-{node.pid}.log"
        try:
            until(lambda: "Ray runtime started" in said.read_text(), START_S, f"a node to join; {said} is its output")
        except TimeoutError:
            self.kill(node)
            raise
        return node

    def host(self, node: psutil.Popen) -> Host:
        """Whose cable can be pulled."""
        return self._hosts[node.pid]

    def kill(self, node: psutil.Popen) -> None:
        """All processes of a node, at once."""
        for process in processes(node):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        node.wait(STOP_S)
        self._nodes.remove(node)

    def ray(self, *arguments: str, **changed: str) -> tuple[str, int]:
        """What one of Ray's commands says, and its exit code."""
        done = subprocess.run(
            [*RAY, *arguments],
            env=self.environment | changed, cwd=ROOT, capture_output=True, text=True, timeout=120,
        )  # fmt: skip
        return done.stdout + done.stderr, done.returncode

    def node_id(self, node: psutil.Popen) -> str:
        """Ray's name of a node."""
        raylet = next(p for p in processes(node) if p.name() == "raylet")
        named = [part for part in raylet.cmdline() if part.startswith("--node_id=")]
        return named[0].partition("=")[2]

    def is_given_up(self, node: psutil.Popen) -> bool:
        """Whether the cluster takes a node for lost."""
        said, _ = self.ray("list", "nodes", "--filter", f"node_id={self.node_id(node)}")
        return "DEAD" in said

    def get(self, path: str, *, token: bool = True) -> bytes:
        """What the dashboard's server answers, asked with the cluster's token if it has one."""
        file = self.environment.get("RAY_AUTH_TOKEN_PATH")
        headers = {"Authorization": f"Bearer {Path(file).read_text()}"} if file and token else {}
        request = urllib.request.Request(self.dashboard + path, headers=headers)
        with urllib.request.urlopen(request, timeout=10) as answer:
            return answer.read()

    def run(self, command: list[str], log: Path) -> subprocess.Popen[bytes]:
        """Start a driver on the head's node."""
        with log.open("ab") as out:
            return subprocess.Popen(
                command,
                cwd=ROOT,
                env=self.environment | {"RAY_ADDRESS": self.address},
                stdout=out,
                stderr=out,
                start_new_session=True,
            )

    def actors(self, name: str) -> list[psutil.Process]:
        """Processes of the actors whose class has this name, or ends with it: `Generator`; or of vLLM's."""
        pattern = re.compile(rf"(ray|VLLM)::(\S+:)?\w*{name}\b")
        return [p for node in self._nodes for p in processes(node) if pattern.match(_title(p))]

    def _start(
        self, *arguments: str, environment: Mapping[str, str] = MappingProxyType({}), prefix: Sequence[str] = ()
    ) -> psutil.Popen:
        command = [*prefix, *RAY, "start", "--block", "--disable-usage-stats", *arguments]
        command += [f"--dashboard-agent-listen-port={free_port()}"]  # through the head's, jobs come
        with tempfile.NamedTemporaryFile(dir=self.folder, delete=False) as output:
            node = psutil.Popen(
                command,
                env={**self.environment, **environment},
                cwd=ROOT,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        os.rename(output.name, self.folder / f"node-{node.pid}.log")
        self._nodes.append(node)
        return node

    def _answers(self) -> Any:
        if self.head.poll() is not None:
            raise RuntimeError((self.folder / f"node-{self.head.pid}.log").read_text())
        with contextlib.suppress(urllib.error.URLError, ConnectionError):
            return self.get("/api/version")


def processes(node: psutil.Popen) -> list[psutil.Process]:
    """A node's, the raylet's parent first."""
    with contextlib.suppress(psutil.NoSuchProcess):
        parent = psutil.Process(node.pid)
        return [parent, *parent.children(recursive=True)]
    return []


def end(driver: subprocess.Popen[bytes]) -> None:
    """Kill -9 of a driver, and nothing else."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(driver.pid, signal.SIGKILL)
    driver.wait(STOP_S)


def _title(process: psutil.Process) -> str:
    with contextlib.suppress(psutil.Error):
        return " ".join(process.cmdline())
    return ""
