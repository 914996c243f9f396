"""Machines of their own, as far as the network goes: namespaces of this one, each with an address, on one switch.

Ray's nodes in them reach each other only through it, and a cable can be pulled: the node's processes live on, and
nobody hears of them. Needs root and iproute2. Files, memory and CPUs are shared, the files as on NFS.
"""

import contextlib
import os
import subprocess
from dataclasses import dataclass


@dataclass(frozen=True)
class Host:
    """One of them."""

    name: str
    """Of its namespace."""
    address: str
    cable: str
    """This end of it."""

    @property
    def enter(self) -> list[str]:
        """What a command is prefixed by to run there."""
        return ["ip", "netns", "exec", self.name]

    def cut(self) -> None:
        """Pull the cable."""
        _ip("link", "set", self.cable, "down")

    def mend(self) -> None:
        """Put it back."""
        _ip("link", "set", self.cable, "up")


class Network:
    """A switch with hosts; use it as a context manager."""

    def __init__(self) -> None:
        number = os.getpid()
        self._switch = f"rl{number}"
        self._prefix = f"10.{200 + number // 256 % 50}.{number % 256}"
        self.address = f"{self._prefix}.1"
        """Of this machine, on the switch."""
        self._hosts: list[Host] = []

    def __enter__(self) -> "Network":
        _ip("link", "add", self._switch, "type", "bridge")
        try:
            _ip("addr", "add", f"{self.address}/24", "dev", self._switch)
            _ip("link", "set", self._switch, "up")
        except OSError:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for host in self._hosts:
            with contextlib.suppress(OSError):  # its end of the cable goes with it
                _ip("netns", "del", host.name)
        _ip("link", "del", self._switch)

    def add(self) -> Host:
        """One more."""
        number = len(self._hosts) + 2
        host = Host(f"{self._switch}-{number}", f"{self._prefix}.{number}", f"{self._switch}v{number}")
        _ip("netns", "add", host.name)
        self._hosts.append(host)
        _ip("link", "add", host.cable, "type", "veth", "peer", "name", "eth0", "netns", host.name)
        _ip("link", "set", host.cable, "master", self._switch, "up")
        _ip("-n", host.name, "addr", "add", f"{host.address}/24", "dev", "eth0")
        for device in ("lo", "eth0"):
            _ip("-n", host.name, "link", "set", device, "up")
        return host


def _ip(*arguments: str) -> None:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True, timeout=30)
    if done.returncode:
        raise OSError(f"ip {' '.join(arguments)}: {done.stderr.strip()}; hosts of their own need root and iproute2")
