"""Training curves: one JSON object per logged step, and the same numbers as TensorBoard scalars and as metrics.

The JSON lines are the record, which reports and trackers read. A training that is interrupted logs some steps a second
time; both readers, `read_metrics` and TensorBoard, then keep the later values. Only one process logs a stage: rank 0.

A file in an object store cannot be appended to. For a remote run, the whole curve is written again and again, and
TensorBoard's events are written to a local folder and copied.
"""

import json
import math
import tempfile
import time
from pathlib import Path
from typing import Any, SupportsFloat

from tensorboard.compat.proto.event_pb2 import Event, SessionLog  # pyright: ignore[reportAttributeAccessIssue]
from tensorboard.compat.proto.summary_pb2 import Summary  # pyright: ignore[reportAttributeAccessIssue]
from tensorboard.summary.writer.event_file_writer import EventFileWriter

from rayrl.metrics import meters
from rayrl.runs import storage

CurveRow = dict[str, Any]
"""One step of a curve: `step`, and by name a number, or None for a value that was not finite."""

AT = "at"
"""Field with the time at which a step was logged, as Unix time. It gives the rate of a training; it is no value of the
curve."""
REMOTE_FLUSH_S = 10.0
"""Shortest time between two writes of a remote run's files, which are small; they are also written at the end."""


class MetricLog:
    """Writer of `metrics/<stage>.jsonl` and `tensorboard/<stage>` of a run; use it as a context manager."""

    def __init__(self, run_dir: str, stage: str) -> None:
        self.url = storage.join(run_dir, "metrics", f"{stage}.jsonl")
        self.stage = stage
        self._is_local = storage.is_local(run_dir)
        self._text = b""
        self._flushed_at = time.monotonic()
        self._last_step: int | None = None
        earlier = storage.read_bytes(self.url) if storage.exists(self.url) else b""
        # A killed process may have left half a line. The next line must not be glued to it.
        line_end = b"\n" if earlier and not earlier.endswith(b"\n") else b""
        self._events_url = storage.join(run_dir, "tensorboard", stage)
        if self._is_local:
            path = Path(storage.locate(self.url)[1])
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = open(path, "ab", buffering=0)  # noqa: SIM115 - closed by close()
            self._file.write(line_end)
            self._events_folder = storage.locate(self._events_url)[1]
        else:
            self._text = earlier + line_end
            self._scratch = tempfile.TemporaryDirectory(prefix="rayrl-tensorboard-")
            self._events_folder = self._scratch.name
        self._events = EventFileWriter(self._events_folder)

    def __enter__(self) -> "MetricLog":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def log(self, step: int, **values: SupportsFloat) -> None:
        """Record all values of one step, once per step: numbers, or 0-d arrays and tensors."""
        numbers = {name: float(value) for name, value in values.items()}
        row: CurveRow = {"step": step, AT: round(time.time(), 3)}
        for name, number in numbers.items():
            row[name] = number if math.isfinite(number) else None  # JSON has no NaN and no infinity
        line = json.dumps(row).encode() + b"\n"
        if self._is_local:
            with storage.refusing_full_disk(self.url):
                self._file.write(line)
        else:
            self._text += line
        self._log_events(step, numbers)
        meters.show_step(self.stage, step, numbers)
        self._last_step = step
        if not self._is_local and time.monotonic() - self._flushed_at > REMOTE_FLUSH_S:
            self._events.flush()
            self._publish()

    def close(self) -> None:
        """Make everything that was logged durable."""
        self._events.close()
        if self._is_local:
            self._file.close()
        else:
            self._publish()
            self._scratch.cleanup()

    def _publish(self) -> None:
        storage.write_bytes(self.url, self._text)
        # One file, whose name holds the start and the id of this process: earlier ones stay in the run.
        for file in Path(self._events_folder).iterdir():
            storage.write_bytes(storage.join(self._events_url, file.name), file.read_bytes())
        self._flushed_at = time.monotonic()

    def _log_events(self, step: int, numbers: dict[str, float]) -> None:
        now = time.time()
        if self._last_step is None or step <= self._last_step:
            # This makes TensorBoard drop what an interrupted process logged at this step and later.
            start = SessionLog(status=SessionLog.SessionStatus.Value("START"))
            self._events.add_event(Event(wall_time=now, step=step, session_log=start))
        scalars = [Summary.Value(tag=f"{self.stage}/{name}", simple_value=number) for name, number in numbers.items()]
        self._events.add_event(Event(wall_time=now, step=step, summary=Summary(value=scalars)))


def read_metrics(url: str) -> list[CurveRow]:
    """Read the curve of one stage, steps ascending. A missing file is an empty curve."""
    curve = []
    for row in _rows(url):
        curve.append({name: value for name, value in row.items() if name != AT})
    return curve


def read_times(url: str) -> dict[int, float]:
    """Read when each step of a curve was logged, as Unix time."""
    return {row["step"]: row[AT] for row in _rows(url)}


def _rows(url: str) -> list[CurveRow]:
    """Read the lines that count: a line replaces every earlier line whose step is not smaller."""
    if not storage.exists(url):
        return []
    rows: list[CurveRow] = []
    for line in storage.read_bytes(url).splitlines():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:  # a process was killed while it wrote this line
            continue
        while rows and rows[-1]["step"] >= row["step"]:
            rows.pop()
        rows.append(row)
    return rows
