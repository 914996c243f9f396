"""Counters and gauges that reach Prometheus through Ray. Outside of a Ray cluster they only keep their numbers.

On every node an agent of Ray's serves what the node's processes send it, with `ray_` before each name. The agent adds
up what it gets of a counter. It forgets the value of a gauge two exports after a process has sent it. So every process
sends the values of its gauges again for as long as it lives, and those of a dead process are gone within half a minute.
"""

import math
import sys
import threading
import time
from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING, ClassVar, TypedDict

if TYPE_CHECKING:
    import ray.util.metrics

SEND_AGAIN_S = 5.0
"""Time between two sends of all gauges: half of the time between two exports (Ray's `metrics_report_interval_ms`)."""

_METERS: list["Meter"] = []
_lock = threading.Lock()


class RayOptions(TypedDict):
    """Arguments of a metric of Ray's."""

    name: str
    description: str
    tag_keys: tuple[str, ...]


@dataclass(eq=False)
class Meter:
    """Base of the metrics. A measurement gives a value to every label; the label `run` is added here."""

    name: str
    unit: str
    about: str
    """Description, which Prometheus shows too."""
    labels: tuple[str, ...] = ()
    values: dict[tuple[str, ...], float] = field(default_factory=dict, init=False)
    """What this process has counted or last set, by the values of the labels."""
    suffix: ClassVar[str] = ""

    def __post_init__(self) -> None:
        _METERS.append(self)

    @property
    def exported(self) -> str:
        """Name in Prometheus."""
        return f"ray_rayrl_{self.name}{self.suffix}"

    def value(self, **labels: str) -> float:
        """Return what this process has counted or last set; 0 if nothing."""
        return self.values.get(self._key(labels), 0.0)

    def _key(self, labels: dict[str, str]) -> tuple[str, ...]:
        assert labels.keys() == set(self.labels), f"{self.name} has the labels {self.labels}, got {tuple(labels)}"
        return tuple(labels[name] for name in self.labels)

    def _ray_options(self) -> RayOptions:
        return {"name": f"rayrl_{self.name}", "description": self.about, "tag_keys": ("run", *self.labels)}

    def _tags(self, key: tuple[str, ...]) -> dict[str, str]:
        return {"run": run_name(), **dict(zip(self.labels, key, strict=True))}


class Counter(Meter):
    """A number that only grows. Prometheus adds `_total` to its name."""

    suffix = "_total"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._ray_counter: ray.util.metrics.Counter | None = None

    def add(self, amount: float = 1, **labels: str) -> None:
        """Add `amount`; 0 is ignored."""
        if amount <= 0:  # Ray refuses to add 0
            return
        key = self._key(labels)
        with _lock:
            self.values[key] = self.values.get(key, 0.0) + amount
        if connected():
            self._instrument().inc(float(amount), tags=self._tags(key))

    def _instrument(self) -> "ray.util.metrics.Counter":
        """Return Ray's side of the counter. It is made late, because it needs a process that is part of a cluster."""
        import ray.util.metrics

        if self._ray_counter is None:
            self._ray_counter = ray.util.metrics.Counter(**self._ray_options())
        return self._ray_counter


class Gauge(Meter):
    """A value that may rise and fall."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._ray_gauge: ray.util.metrics.Gauge | None = None

    def set(self, value: float, **labels: str) -> None:
        """Set the value; a number that is not finite removes it."""
        key = self._key(labels)
        if not math.isfinite(value):
            self.values.pop(key, None)
            return
        self.values[key] = float(value)
        if connected():
            self._instrument().set(float(value), tags=self._tags(key))
            _start_sending()

    def forget(self) -> None:
        """Remove all values, whatever their labels."""
        self.values.clear()

    def send_again(self) -> None:
        """Send every value to Ray again."""
        for key, value in list(self.values.items()):  # a copy: other threads set values meanwhile
            self._instrument().set(value, tags=self._tags(key))

    def _instrument(self) -> "ray.util.metrics.Gauge":
        """Return Ray's side of the gauge. It is made late, because it needs a process that is part of a cluster."""
        import ray.util.metrics

        if self._ray_gauge is None:
            self._ray_gauge = ray.util.metrics.Gauge(**self._ray_options())
        return self._ray_gauge


def connected() -> bool:
    """Tell whether this process is part of a Ray cluster, without importing Ray."""
    if "ray" not in sys.modules:
        return False
    import ray

    return ray.is_initialized()


def defined() -> list[Meter]:
    """Return every metric, in the order of definition."""
    return list(_METERS)


def name_run(name: str) -> None:
    """Set the name of the run for all processes of this Ray job: in the driver, once it is part of a cluster."""
    from ray.experimental import internal_kv

    internal_kv._internal_kv_put(_run_key(), name)
    run_name.cache_clear()


@cache
def run_name() -> str:
    """Return the name of this Ray job's run, as the driver has set it; empty if it has not."""
    from ray.experimental import internal_kv

    found = internal_kv._internal_kv_get(_run_key())
    return found.decode() if found else ""


def replica() -> dict[str, str]:
    """Return the labels `fleet` and `replica` of this process's actor, from its name <fleet>-<number>; else empty."""
    name = ""
    if connected():
        import ray

        name = ray.get_runtime_context().get_actor_name() or ""
    fleet, _, number = name.rpartition("-")
    return {"fleet": fleet, "replica": number}


def was_restarted() -> bool:
    """Tell whether this process runs an actor that Ray has started again after it died."""
    if not connected():
        return False
    import ray

    context = ray.get_runtime_context()
    return context.get_actor_id() is not None and bool(context.was_current_actor_reconstructed)


def _run_key() -> str:
    import ray

    return f"rayrl-run-{ray.get_runtime_context().get_job_id()}"


@cache  # one thread for each process
def _start_sending() -> None:
    threading.Thread(target=_send_gauges, daemon=True, name="rayrl-gauges").start()


def _send_gauges() -> None:
    while True:
        time.sleep(SEND_AGAIN_S)
        if connected():
            for meter in _METERS:
                if isinstance(meter, Gauge):
                    meter.send_again()
