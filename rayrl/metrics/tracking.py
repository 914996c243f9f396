"""Experiment trackers: pass a run's curves on to Weights & Biases and MLflow, if the config asks for them.

The driver reads what rank 0 writes (metrics/*.jsonl) and passes on what is new. So a tracker that is slow or away costs
the training nothing, and its key is needed on the driver's node only. The run's own curves stay the record. The file
`tracking-<tracker>.json` keeps the last step of each curve that was passed on.
"""

import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Protocol

from rayrl.config import MlflowConfig, WandbConfig
from rayrl.errors import ConfigError
from rayrl.metrics.curves import CurveRow, read_metrics
from rayrl.records import content_id
from rayrl.runs import storage
from rayrl.runs.run import Run

logger = logging.getLogger(__name__)

POLL_S = 10.0
END_S = 300.0
"""Longest wait of a finished run for its trackers."""
MLFLOW_BATCH = 100
"""Parameters that MLflow accepts in one call; it would accept more metrics."""


class Tracker(Protocol):
    """Receiver of curves."""

    def log(self, stage: str, rows: list[CurveRow]) -> None:
        """Keep some steps of a stage."""
        ...

    def close(self, *, failed: bool) -> None:
        """End the run at the tracker."""
        ...


class WandbTracker:
    """One run at Weights & Biases, continued when the run is."""

    def __init__(self, run: Run, config: WandbConfig):
        import wandb  # pyright: ignore[reportMissingImports]

        self._run = wandb.init(
            project=config.project,
            entity=config.entity,
            mode=config.mode,
            name=run.config.name,
            id=content_id("wandb", run.url),
            resume="allow" if config.mode == "online" else None,
            dir=run.url if storage.is_local(run.url) else None,
            config=run.config.model_dump(mode="json"),
            settings=wandb.Settings(console="off"),
        )
        self._stages: set[str] = set()

    def log(self, stage: str, rows: list[CurveRow]) -> None:
        if stage not in self._stages:
            # wandb has one step for the whole run, but every stage counts its own steps from the start.
            self._run.define_metric(f"{stage}/*", step_metric=f"{stage}/step")
            self._stages.add(stage)
        for row in rows:
            self._run.log({f"{stage}/{name}": value for name, value in row.items() if value is not None})

    def close(self, *, failed: bool) -> None:
        self._run.finish(exit_code=int(failed))


class MlflowTracker:
    """One run at MLflow, found again by its tag when the run continues."""

    def __init__(self, run: Run, config: MlflowConfig):
        from mlflow import MlflowClient  # pyright: ignore[reportMissingImports]
        from mlflow.entities import Param  # pyright: ignore[reportMissingImports]

        self._client = MlflowClient(config.tracking_uri or f"sqlite:///{run.url}/mlflow.db")
        found = self._client.get_experiment_by_name(config.experiment)
        experiment = found.experiment_id if found else self._client.create_experiment(config.experiment)
        tag = content_id("mlflow", run.url)
        earlier = self._client.search_runs([experiment], filter_string=f"tags.rayrl_run = '{tag}'")
        if earlier:
            self._id = earlier[0].info.run_id
            self._client.update_run(self._id, status="RUNNING")
            return
        made = self._client.create_run(experiment, run_name=run.config.name, tags={"rayrl_run": tag})
        self._id = made.info.run_id
        params = [Param(name, str(value)) for name, value in flat(run.config.model_dump(mode="json"))]
        for start in range(0, len(params), MLFLOW_BATCH):
            self._client.log_batch(self._id, params=params[start : start + MLFLOW_BATCH])

    def log(self, stage: str, rows: list[CurveRow]) -> None:
        from mlflow.entities import Metric  # pyright: ignore[reportMissingImports]

        now_ms = int(time.time() * 1000)
        metrics = []
        for row in rows:
            for name, value in row.items():
                if name != "step" and value is not None:
                    metrics.append(Metric(f"{stage}/{name}", value, now_ms, int(row["step"])))
        for start in range(0, len(metrics), MLFLOW_BATCH):
            self._client.log_batch(self._id, metrics=metrics[start : start + MLFLOW_BATCH])

    def close(self, *, failed: bool) -> None:
        self._client.set_terminated(self._id, status="FAILED" if failed else "FINISHED")


class Follower:
    """Passes the new steps of all curves of a run on to one tracker."""

    def __init__(self, run_url: str, name: str, tracker: Tracker):
        self.name = name
        self.tracker = tracker
        self._run_url = run_url
        self._kept = storage.join(run_url, f"tracking-{name}.json")
        self._sent: dict[str, int] = storage.read_json(self._kept) if storage.exists(self._kept) else {}

    def pass_on(self) -> None:
        """Log what is new; what cannot be read or logged now is tried again at the next call.

        A step that an interrupted stage repeats is not logged a second time: trackers only append.
        """
        try:
            for stage, url in curves(self._run_url):
                last_sent = self._sent.get(stage, -1)
                new = [row for row in read_metrics(url) if row["step"] > last_sent]
                if new:
                    self.tracker.log(stage, new)
                    self._sent[stage] = new[-1]["step"]
                    storage.write_json(self._kept, self._sent)
        except Exception as error:  # no error of a tracker is a reason to end the run
            logger.warning("tracking.%s: new steps are kept back: %s", self.name, error)

    def close(self, *, failed: bool) -> None:
        """Pass on what is left, and end the run at the tracker."""
        self.pass_on()
        try:
            self.tracker.close(failed=failed)
        except Exception as error:  # the run has its results, and keeps them without the tracker
            logger.warning("tracking.%s did not end well: %s", self.name, error)


def curves(run_url: str) -> list[tuple[str, str]]:
    """Return (stage, URL) of every curve of a run; a later round's stage is named <stage>-<round>."""
    fs, path = storage.locate(run_url)
    found = []
    for pattern in ("metrics/*.jsonl", "rounds/*/metrics/*.jsonl"):
        for file in sorted(fs.glob(f"{path}/{pattern}")):
            *_, round_number, _, file_name = str(file).split("/")
            stage = file_name.removesuffix(".jsonl")
            if pattern.startswith("rounds"):
                stage = f"{stage}-{round_number}"
            found.append((stage, fs.unstrip_protocol(str(file))))
    return found


@contextmanager
def tracked(run: Run) -> Iterator[None]:
    """Let the trackers that the config names follow the run inside the context.

    Raises:
        ConfigError: a tracker cannot be reached.
    """
    config = run.config.tracking
    trackers: dict[str, Tracker] = {}
    if config.wandb is not None:
        trackers["wandb"] = started("wandb", partial(WandbTracker, run, config.wandb))
    if config.mlflow is not None:
        trackers["mlflow"] = started("mlflow", partial(MlflowTracker, run, config.mlflow))
    followers = [Follower(run.url, name, tracker) for name, tracker in trackers.items()]
    if not followers:
        yield
        return
    with following(followers):
        yield


def started(name: str, start: Callable[[], Tracker]) -> Tracker:
    """Start a tracker.

    Raises:
        ConfigError: it cannot be reached.
    """
    try:
        return start()
    except Exception as error:
        raise ConfigError(
            f"tracking.{name} must name a tracker that can be reached when a run starts, and starting it failed with "
            f"{error!r}; correct the table, or leave it out: the run keeps its curves anyway"
        ) from error


@contextmanager
def following(followers: list[Follower], *, poll_s: float = POLL_S, end_s: float = END_S) -> Iterator[None]:
    """Pass new steps on inside the context, and the last ones at its end.

    Args:
        followers: one for each tracker.
        poll_s: seconds between two looks at the curves.
        end_s: longest wait at the end.
    """
    over = threading.Event()
    failed = True

    def follow() -> None:
        while not over.wait(poll_s):
            for follower in followers:
                follower.pass_on()
        for follower in followers:
            follower.close(failed=failed)

    # A daemon: a tracker that hangs must not keep the driver's process from ending.
    thread = threading.Thread(target=follow, daemon=True, name="rayrl-tracking")
    thread.start()
    try:
        yield
        failed = False
    finally:
        over.set()
        thread.join(end_s)
        if thread.is_alive():
            logger.warning("trackers did not end within %.0f s; what they lack is in the run's metrics", end_s)


def flat(tree: Mapping[str, object], prefix: str = "") -> Iterator[tuple[str, object]]:
    """Yield the settings of a config by their dotted names."""
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
