"""Local Ray cluster of several nodes on this machine, for tests, rehearsals and benches of recovery.

A head without CPUs and worker nodes, each a raylet with processes of its own:

    with LocalCluster(folder, num_workers=2) as cluster:
        driver = cluster.run([sys.executable, "jobs/proxy_dpo.py", "mine.toml"], folder / "driver.log")
        cluster.kill(cluster.workers[0])
        cluster.add()

A node that is killed dies as a machine does: all of its processes at once, and no other node is notified. With a
`rayrl.fleets.local_network.Network`, each worker node is a host whose link can be cut.
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
from typing import TypeVar

import psutil

from rayrl.fleets.local_network import Host, Network

RAY = [sys.executable, "-m", "ray.scripts.scripts"]
START_S = 90.0
STOP_S = 30.0
COMMAND_S = 120.0
"""Longest run of one of Ray's commands."""
RAY_SETTINGS = {
    # A lost node is noticed after some five seconds and a silent one after fifteen, where the default is a minute.
    "RAY_health_check_initial_delay_ms": "2000",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "2000",
    # Idle worker processes are kept: on few cores, starting them again is what costs most.
    "RAY_idle_worker_killing_time_threshold_ms": "600000",
}

T = TypeVar("T")


def wait_until(condition: Callable[[], T], timeout_s: float, what: str) -> T:
    """Call `condition` again and again until its value is true, and return that value.

    Raises:
        TimeoutError: no value was true in time; the message names `what` was waited for.
    """
    deadline = time.monotonic() + timeout_s
    while not (value := condition()):
        if time.monotonic() > deadline:
            raise TimeoutError(f"waited {timeout_s:.0f} s for {what}")
        time.sleep(0.1)
    return value


def free_port() -> int:
    """Return a port that is free now."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        return bound.getsockname()[1]


class LocalCluster:
    """A running cluster; use it as a context manager.

    Args:
        folder: folder for the nodes' output.
        num_workers: worker nodes at the start.
        num_cpus: CPUs of each worker node.
        environment: variables for the nodes and for drivers, besides those of this process.
        network: gives each worker node a host of its own; without it all nodes share this machine's address.
        working_dir: folder in which nodes and drivers run and from which they import; None is the current one.
    """

    def __init__(
        self,
        folder: Path,
        *,
        num_workers: int = 2,
        num_cpus: int = 2,
        environment: Mapping[str, str] = MappingProxyType({}),
        network: Network | None = None,
        working_dir: Path | None = None,
    ):
        self.folder = folder
        self.working_dir = Path.cwd() if working_dir is None else working_dir
        gcs_port, dashboard_port = free_port(), free_port()
        self.address = f"{network.address if network else '127.0.0.1'}:{gcs_port}"
        self.dashboard = f"http://127.0.0.1:{dashboard_port}"
        # Variables of another Ray, such as its address, must not reach this one.
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        self.environment = inherited | {
            "RAY_AUTH_MODE": "disabled",
            "RAY_API_SERVER_ADDRESS": self.dashboard,
            "RAY_worker_niceness": "0",
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
            "PYTHONPATH": str(self.working_dir),
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            **RAY_SETTINGS,
        }
        if network:
            # gloo finds its address by the host name, and all hosts have this machine's name.
            self.environment["GLOO_SOCKET_IFNAME"] = "eth0"
        self.environment |= environment
        self._num_workers, self._num_cpus = num_workers, num_cpus
        self._network = network
        self._hosts: dict[int, Host] = {}
        self._temporary = tempfile.mkdtemp(prefix="rayrl-")  # a short path: Ray puts sockets there
        self._nodes: list[psutil.Popen] = []
        self._head_arguments = ["--head", f"--port={gcs_port}", "--num-cpus=0", f"--temp-dir={self._temporary}"]
        self._head_arguments += ["--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard_port}"]
        if network:
            self._head_arguments.append(f"--node-ip-address={network.address}")

    def __enter__(self) -> "LocalCluster":
        try:
            self.head = self._start(*self._head_arguments)
            wait_until(self._is_dashboard_up, START_S, "the head's dashboard")
            # One after the other: nodes that share an address and start at once disturb each other.
            for _ in range(self._num_workers):
                self.add()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for node in reversed(list(self._nodes)):  # the head last
            self.kill(node)
        shutil.rmtree(self._temporary, ignore_errors=True)

    @property
    def workers(self) -> list[psutil.Popen]:
        """Worker nodes that are alive, the oldest first."""
        return [node for node in self._nodes if node is not self.head]

    def add(self, **environment: str) -> psutil.Popen:
        """Add a worker node with these variables, and return it once its raylet has joined."""
        # A temporary folder of its own, as on a machine of its own: a node removes the files of ended jobs, and in a
        # shared folder it would remove those that a job's driver still runs in.
        number = len(list(Path(self._temporary).iterdir()))
        arguments = [f"--temp-dir={self._temporary}/{number}"]
        arguments += [f"--address={self.address}", f"--num-cpus={self._num_cpus}"]
        host = self._network.add() if self._network else None
        if host:
            arguments.append(f"--node-ip-address={host.address}")
        node = self._start(*arguments, environment=environment, prefix=host.enter if host else ())
        if host:
            self._hosts[node.pid] = host
        log = self._log(node)
        try:
            wait_until(lambda: "Ray runtime started" in log.read_text(), START_S, f"a node to join; its log is {log}")
        except TimeoutError:
            self.kill(node)
            raise
        return node

    def host(self, node: psutil.Popen) -> Host:
        """Return the host of a worker node, in a cluster with a network."""
        return self._hosts[node.pid]

    def kill(self, node: psutil.Popen) -> None:
        """Kill all processes of a node at once."""
        # The raylet's parent comes first, and cannot restart or report what dies after it.
        for process in processes(node):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        node.wait(STOP_S)
        self._nodes.remove(node)

    def ray(self, *arguments: str, **environment: str) -> tuple[str, int]:
        """Run one of Ray's commands on the head; returns its output and its exit code."""
        done = subprocess.run(
            [*RAY, *arguments],
            env=self.environment | environment,
            cwd=self.working_dir,
            capture_output=True,
            text=True,
            timeout=COMMAND_S,
        )
        return done.stdout + done.stderr, done.returncode

    def node_id(self, node: psutil.Popen) -> str:
        """Return Ray's id of a node."""
        raylet = next(process for process in processes(node) if process.name() == "raylet")
        (argument,) = [part for part in raylet.cmdline() if part.startswith("--node_id=")]
        return argument.partition("=")[2]

    def is_given_up(self, node: psutil.Popen) -> bool:
        """Tell whether the cluster counts a node as lost."""
        output, _ = self.ray("list", "nodes", "--filter", f"node_id={self.node_id(node)}")
        return "DEAD" in output

    def get(self, path: str, *, token: bool = True) -> bytes:
        """Get a path from the dashboard's server, with the cluster's token if it has one."""
        token_file = self.environment.get("RAY_AUTH_TOKEN_PATH")
        headers = {"Authorization": f"Bearer {Path(token_file).read_text()}"} if token_file and token else {}
        request = urllib.request.Request(self.dashboard + path, headers=headers)
        with urllib.request.urlopen(request, timeout=10) as answer:
            return answer.read()

    def run(self, command: list[str], log: Path) -> subprocess.Popen[bytes]:
        """Start a driver on the head, which appends its output to `log`."""
        with log.open("ab") as output:
            return subprocess.Popen(
                command,
                cwd=self.working_dir,
                env=self.environment | {"RAY_ADDRESS": self.address},
                stdout=output,
                stderr=output,
                start_new_session=True,  # Ctrl-C in a terminal then reaches this process only, which ends the cluster
            )

    def actors(self, name: str) -> list[psutil.Process]:
        """Return the processes of actors whose class has this name or ends in it, and of vLLM's with such a title."""
        pattern = re.compile(rf"(ray|VLLM)::(\S+:)?\w*{name}\b")
        found = []
        for node in self._nodes:
            found += [process for process in processes(node) if pattern.match(_title(process))]
        return found

    def _log(self, node: psutil.Popen) -> Path:
        return self.folder / f"node-{node.pid}.log"

    def _start(
        self, *arguments: str, environment: Mapping[str, str] = MappingProxyType({}), prefix: Sequence[str] = ()
    ) -> psutil.Popen:
        command = [*prefix, *RAY, "start", "--block", "--disable-usage-stats", *arguments]
        # Each node's agent listens on a port, and without a network the nodes share one address.
        command.append(f"--dashboard-agent-listen-port={free_port()}")
        with tempfile.NamedTemporaryFile(dir=self.folder, delete=False) as output:
            node = psutil.Popen(
                command,
                env={**self.environment, **environment},
                cwd=self.working_dir,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        os.rename(output.name, self._log(node))  # the name holds the process's id, which is known only now
        self._nodes.append(node)
        return node

    def _is_dashboard_up(self) -> bool:
        if self.head.poll() is not None:  # it will never answer: show why, at once
            raise RuntimeError(self._log(self.head).read_text())
        with contextlib.suppress(urllib.error.URLError, ConnectionError):
            return bool(self.get("/api/version"))
        return False


def processes(node: psutil.Popen) -> list[psutil.Process]:
    """Return a node's processes, the raylet's parent first."""
    with contextlib.suppress(psutil.NoSuchProcess):
        parent = psutil.Process(node.pid)
        return [parent, *parent.children(recursive=True)]
    return []


def kill_process(process: subprocess.Popen[bytes]) -> None:
    """Send SIGKILL to a process, not to its children, and wait for its end."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(process.pid, signal.SIGKILL)
    process.wait(STOP_S)


def _title(process: psutil.Process) -> str:
    with contextlib.suppress(psutil.Error):
        return " ".join(process.cmdline())
    return ""
