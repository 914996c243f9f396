"""Network of hosts on this machine, for local clusters: Linux network namespaces, joined by a bridge.

Each host has an address of its own, and its processes reach other hosts only over its link. A link can be cut: the
host's processes live on, but the others hear nothing from them. Needs root and iproute2. Files, memory and CPUs are
shared by all hosts, the files as on NFS.
"""

import contextlib
import os
import subprocess
from dataclasses import dataclass


@dataclass(frozen=True)
class Host:
    """One host of a network."""

    name: str
    """Name of its namespace."""
    address: str
    link: str
    """Network device at this machine's end of its link."""

    @property
    def enter(self) -> list[str]:
        """Words before a command that run the command on this host."""
        return ["ip", "netns", "exec", self.name]

    def disconnect(self) -> None:
        """Cut the link."""
        _ip("link", "set", self.link, "down")

    def reconnect(self) -> None:
        """Restore the link."""
        _ip("link", "set", self.link, "up")


class Network:
    """A bridge with hosts; use it as a context manager."""

    def __init__(self) -> None:
        # Names and addresses follow from the process id, so that tests in several processes do not collide.
        number = os.getpid()
        self._bridge = f"rl{number}"
        self._prefix = f"10.{200 + number // 256 % 50}.{number % 256}"
        self.address = f"{self._prefix}.1"
        """Address of this machine on the bridge."""
        self._hosts: list[Host] = []

    def __enter__(self) -> "Network":
        _ip("link", "add", self._bridge, "type", "bridge")
        try:
            _ip("addr", "add", f"{self.address}/24", "dev", self._bridge)
            _ip("link", "set", self._bridge, "up")
        except OSError:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for host in self._hosts:
            with contextlib.suppress(OSError):  # the host's end of the link goes with its namespace
                _ip("netns", "del", host.name)
        _ip("link", "del", self._bridge)

    def add(self) -> Host:
        """Add a host."""
        number = len(self._hosts) + 2  # .1 is this machine
        host = Host(f"{self._bridge}-{number}", f"{self._prefix}.{number}", f"{self._bridge}v{number}")
        _ip("netns", "add", host.name)
        self._hosts.append(host)  # from here on `__exit__` removes it, should a step below fail
        _ip("link", "add", host.link, "type", "veth", "peer", "name", "eth0", "netns", host.name)
        _ip("link", "set", host.link, "master", self._bridge, "up")
        _ip("-n", host.name, "addr", "add", f"{host.address}/24", "dev", "eth0")
        for device in ("lo", "eth0"):
            _ip("-n", host.name, "link", "set", device, "up")
        return host


def _ip(*arguments: str) -> None:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True, timeout=30)
    if done.returncode:
        raise OSError(f"ip {' '.join(arguments)}: {done.stderr.strip()}; a local network needs root and iproute2")
