"""Training curves: one JSON object per logged step, and the same numbers as TensorBoard scalars and as metrics.

The JSON lines are the record; the report and the notebook read them. An interrupted stage logs some steps a
second time: both readers (here and TensorBoard's) keep the later values. One process logs a stage: rank 0.

Object stores cannot append. A remote run's curve is written whole again and again, and TensorBoard's events are written
to a local folder and copied.
"""

import json
import math
import tempfile
import time
from pathlib import Path
from typing import Any

from tensorboard.compat.proto.event_pb2 import Event, SessionLog  # pyright: ignore[reportAttributeAccessIssue]
from tensorboard.compat.proto.summary_pb2 import Summary  # pyright: ignore[reportAttributeAccessIssue]
from tensorboard.summary.writer.event_file_writer import EventFileWriter

from rayrl.metrics import meters
from rayrl.runs import storage

AT = "at"
"""When a step was logged, as Unix time: for its rate, and no value of the curve."""
REMOTE_FLUSH_S = 10.0
"""A remote run's (small) files are written again at most this often, and at the end."""


class MetricLog:
    """Writes `metrics/<stage>.jsonl` and `tensorboard/<stage>` of a run; use it as a context manager."""

    def __init__(self, run_dir: str, stage: str) -> None:
        self.url = storage.join(run_dir, "metrics", f"{stage}.jsonl")
        self.stage = stage
        self._local = storage.is_local(run_dir)
        self._text = b""
        self._flushed_at = time.monotonic()
        self._last_step: int | None = None
        earlier = storage.read_bytes(self.url) if storage.exists(self.url) else b""
        # a killed process may have left half a line: the next one must not be glued to it
        torn = b"\n" if earlier and not earlier.endswith(b"\n") else b""
        self._events_url = storage.join(run_dir, "tensorboard", stage)
        if self._local:
            path = Path(storage.locate(self.url)[1])
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = open(path, "ab", buffering=0)  # noqa: SIM115 - closed by close()
            self._file.write(torn)
            self._events_folder = storage.locate(self._events_url)[1]
        else:
            self._text = earlier + torn
            self._scratch = tempfile.TemporaryDirectory(prefix="rayrl-tensorboard-")
            self._events_folder = self._scratch.name
        self._events = EventFileWriter(self._events_folder)

    def __enter__(self) -> "MetricLog":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def log(self, step: int, **values: Any) -> None:
        """Record all values of one step, once per step: numbers, or 0-d arrays and tensors."""
        numbers = {name: float(value) for name, value in values.items()}
        row = {"step": step, AT: round(time.time(), 3)} | {
            name: x if math.isfinite(x) else None for name, x in numbers.items()
        }
        line = json.dumps(row).encode() + b"\n"
        if self._local:
            with storage.refusing_full_disk(self.url):
                self._file.write(line)
        else:
            self._text += line
        self._log_events(step, numbers)
        meters.show_step(self.stage, step, numbers)
        self._last_step = step
        if not self._local and time.monotonic() - self._flushed_at > REMOTE_FLUSH_S:
            self._events.flush()
            self._publish()

    def close(self) -> None:
        """Make everything logged so far durable."""
        self._events.close()
        if self._local:
            self._file.close()
        else:
            self._publish()
            self._scratch.cleanup()

    def _publish(self) -> None:
        storage.write_bytes(self.url, self._text)
        for file in Path(self._events_folder).iterdir():  # one: its name has this process's start and id in it
            storage.write_bytes(storage.join(self._events_url, file.name), file.read_bytes())
        self._flushed_at = time.monotonic()

    def _log_events(self, step: int, numbers: dict[str, float]) -> None:
        now = time.time()
        if self._last_step is None or step <= self._last_step:
            # TensorBoard then drops what an interrupted process logged at this step and later
            start = SessionLog(status=SessionLog.SessionStatus.Value("START"))
            self._events.add_event(Event(wall_time=now, step=step, session_log=start))
        scalars = [Summary.Value(tag=f"{self.stage}/{name}", simple_value=x) for name, x in numbers.items()]
        self._events.add_event(Event(wall_time=now, step=step, summary=Summary(value=scalars)))


def read_metrics(url: str) -> list[dict[str, Any]]:
    """The curve of one stage, steps ascending; a value that was not finite is None.

    A line supersedes every earlier line whose step is not smaller. No file is an empty curve.
    """
    return [{name: value for name, value in row.items() if name != AT} for row in _rows(url)]


def read_times(url: str) -> dict[int, float]:
    """When each step of a curve was logged, as Unix time; without those of before times were kept."""
    return {row["step"]: row[AT] for row in _rows(url) if AT in row}


def _rows(url: str) -> list[dict[str, Any]]:
    if not storage.exists(url):
        return []
    rows: list[dict[str, Any]] = []
    for line in storage.read_bytes(url).splitlines():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:  # the line a killed process was writing
            continue
        while rows and rows[-1]["step"] >= row["step"]:
            rows.pop()
        rows.append(row)
    return rows
