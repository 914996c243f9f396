"""Counters and gauges that reach Prometheus through Ray. Without Ray they only keep their numbers.

Ray's agent on every node serves what the node's processes send it, each name with `ray_` in front. It adds up a
counter. A gauge it forgets two exports after a process has sent it: so a process sends its gauges again for as long as
it lives, and those of a dead one are gone within half a minute.
"""

import math
import sys
import threading
import time
from dataclasses import dataclass, field
from functools import cache
from typing import Any, ClassVar

SEND_AGAIN_S = 5.0
"""Half of the time between two exports (Ray's `metrics_report_interval_ms`)."""

_METERS: list["Meter"] = []
_lock = threading.Lock()


@dataclass(eq=False)
class Meter:
    """One metric. A measurement names the value of every label; which run it is of is added here."""

    name: str
    unit: str
    about: str
    labels: tuple[str, ...] = ()
    values: dict[tuple[str, ...], float] = field(default_factory=dict, init=False)
    """What this process has counted or last set, by the values of the labels."""
    kind: ClassVar[str]
    suffix: ClassVar[str] = ""

    def __post_init__(self) -> None:
        self._ray: Any = None
        _METERS.append(self)

    @property
    def exported(self) -> str:
        """What it is called in Prometheus."""
        return f"ray_rayrl_{self.name}{self.suffix}"

    def value(self, **labels: str) -> float:
        """What this process has counted or last set; 0 if nothing."""
        return self.values.get(self._key(labels), 0.0)

    def _key(self, labels: dict[str, str]) -> tuple[str, ...]:
        assert labels.keys() == set(self.labels), f"{self.name} has the labels {self.labels}, got {tuple(labels)}"
        return tuple(labels[name] for name in self.labels)

    def _instrument(self) -> Any:
        """Ray's side of it."""
        import ray.util.metrics

        if self._ray is None:
            of_ray = {"counter": ray.util.metrics.Counter, "gauge": ray.util.metrics.Gauge}[self.kind]
            self._ray = of_ray(f"rayrl_{self.name}", description=self.about, tag_keys=("run", *self.labels))
        return self._ray

    def _tags(self, key: tuple[str, ...]) -> dict[str, str]:
        return {"run": run_name(), **dict(zip(self.labels, key, strict=True))}


class Counter(Meter):
    """What only grows; Prometheus adds `_total` to its name."""

    kind = "counter"
    suffix = "_total"

    def add(self, amount: float = 1, **labels: str) -> None:
        """Count `amount` more; nothing is nothing."""
        if amount <= 0:  # Ray refuses to add 0
            return
        key = self._key(labels)
        with _lock:
            self.values[key] = self.values.get(key, 0.0) + amount
        if connected():
            self._instrument().inc(float(amount), tags=self._tags(key))


class Gauge(Meter):
    """What has a value now."""

    kind = "gauge"

    def set(self, value: float, **labels: str) -> None:
        """It is now `value`; a number that is not finite leaves it without one."""
        key = self._key(labels)
        if not math.isfinite(value):
            self.values.pop(key, None)
            return
        self.values[key] = float(value)
        if connected():
            self._instrument().set(float(value), tags=self._tags(key))
            _keep_sending()

    def forget(self) -> None:
        """It has no value any more, whatever the labels."""
        self.values.clear()

    def send_again(self) -> None:
        """Tell Ray every value anew."""
        for key, value in list(self.values.items()):
            self._instrument().set(value, tags=self._tags(key))


def connected() -> bool:
    """Whether this process is part of a Ray cluster. Loads nothing."""
    if "ray" not in sys.modules:
        return False
    import ray

    return ray.is_initialized()


def defined() -> list[Meter]:
    """Every metric, in the order of definition."""
    return list(_METERS)


def name_run(name: str) -> None:
    """Say in the driver, once it is part of a cluster, which run this Ray job is: all its processes read it there."""
    from ray.experimental import internal_kv

    internal_kv._internal_kv_put(_run_key(), name)
    run_name.cache_clear()


@cache
def run_name() -> str:
    """The run that this Ray job is, empty if nobody has said."""
    from ray.experimental import internal_kv

    found = internal_kv._internal_kv_get(_run_key())
    return found.decode() if found else ""


def replica() -> dict[str, str]:
    """The labels `fleet` and `replica` of this process's actor, by its name <fleet>-<number>; else empty."""
    name = ""
    if connected():
        import ray

        name = ray.get_runtime_context().get_actor_name() or ""
    fleet, _, number = name.rpartition("-")
    return {"fleet": fleet, "replica": number}


def was_restarted() -> bool:
    """Whether Ray has started this process's actor again, after it died."""
    if not connected():
        return False
    import ray

    context = ray.get_runtime_context()
    return context.get_actor_id() is not None and bool(context.was_current_actor_reconstructed)


def _run_key() -> str:
    import ray

    return f"rayrl-run-{ray.get_runtime_context().get_job_id()}"


@cache
def _keep_sending() -> None:
    threading.Thread(target=_send_again_and_again, daemon=True, name="rayrl-gauges").start()


def _send_again_and_again() -> None:
    while True:
        time.sleep(SEND_AGAIN_S)
        if connected():
            for meter in _METERS:
                if isinstance(meter, Gauge):
                    meter.send_again()
