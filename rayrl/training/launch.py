"""One `fit()` of Ray Train around a training loop. The only importer of ray.train.

A lost worker is Ray Train's to restart, and so is a lost driver: the same storage path continues the same fit. Left to
itself it would also wait for ever, a minute at a time, for room for its workers.

From which checkpoint is for the workers to say (rayrl/training/checkpoints.py): Ray Train knows the last one it was
told of, and not whether it can be read.
"""

import logging
import os
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from functools import partial
from itertools import chain
from typing import Any

import ray.data
import ray.train
from pyarrow.fs import FileSystem, FSSpecHandler, PyFileSystem
from ray.exceptions import RayActorError
from ray.train import Checkpoint, CheckpointConfig, DataConfig, FailureConfig, RunConfig, ScalingConfig
from ray.train.collective import broadcast_from_rank_zero
from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.v2._internal.constants import ENV_VARS_TO_PROPAGATE
from ray.train.v2._internal.exceptions import WorkerGroupStartupFailedError, WorkerGroupStartupTimeoutError

from rayrl.config import TrainingConfig
from rayrl.errors import RayRLError, StageTimeout
from rayrl.runs.storage import is_local, join, locate, refusing_full_disk
from rayrl.training import checkpoints

logger = logging.getLogger(__name__)

Stream = Callable[[int, int], "ray.data.Dataset"]
"""(rank, world size) -> the rows of that rank, in an order that never changes."""
START_TIMEOUT = "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"
"""Ray Train's environment variable: seconds for which a fit, or a restart of its workers, waits for room."""
START_TIMEOUT_S = 600.0
"""Unless the environment says otherwise: as long as a fleet waits for its engines."""
POLL = "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S"
POLL_S = 0.5
"""Between two looks of Ray Train's controller at its workers. Each checkpoint waits for one, and so does the end."""
ADDRESS = "RAY_ADDRESS"
_fit_url: ContextVar[str] = ContextVar("fit_url")
"""In a worker: where this fit's checkpoints are."""


def fit(
    loop: Callable[[Any, "Rows"], None],
    job: Any,
    training: TrainingConfig,
    stream: Stream,
    *,
    storage: str,
    on_gpu: bool,
    name: str = "fit",
) -> dict[str, Any]:
    """Run a loop on every worker and return the metrics of its last report.

    Args:
        loop: the training function; called with `job` and its rows on every worker.
        job: a picklable dataclass with all the loop needs.
        training: workers and failures.
        stream: the training rows of each rank.
        storage: folder of the fit's checkpoints (any fsspec URL).
        on_gpu: one GPU per worker, else one CPU.
        name: what Ray's dashboard calls it, and the folder in `storage`.

    Raises:
        RayRLError: a worker's own, DiskFull among them; the whole checkpoints are still there.
        StageTimeout: there was no room for the workers in time; says what they take, and what there is.
    """
    os.environ.setdefault(START_TIMEOUT, f"{START_TIMEOUT_S:g}")
    os.environ.setdefault(POLL, f"{POLL_S:g}")
    started = time.monotonic()
    url = join(storage, name)
    filesystem, path = _filesystem(storage)
    options = ray.data.ExecutionOptions(preserve_order=True)
    trainer = partial(
        TorchTrainer,
        _run,
        train_loop_config={"loop": loop, "job": job, "fit_url": url},
        scaling_config=ScalingConfig(
            num_workers=training.num_workers,
            use_gpu=on_gpu,
            resources_per_worker=None if on_gpu else {"CPU": 1},
        ),
        torch_config=TorchConfig(backend=None if on_gpu else "gloo"),
        run_config=RunConfig(
            name=name,
            storage_path=path,
            storage_filesystem=filesystem,
            failure_config=FailureConfig(max_failures=training.max_failures, controller_failure_limit=0),
            checkpoint_config=CheckpointConfig(num_to_keep=checkpoints.NUM_KEPT),
        ),
        datasets={f"rank{r}": stream(r, training.num_workers) for r in range(training.num_workers)},
        dataset_config=DataConfig(datasets_to_split=[], execution_options=options),
    )
    try:
        with _naming_this_cluster():
            metrics = _fitted(trainer, url, training.max_failures)
    except WorkerGroupStartupTimeoutError:
        has, free = ray.cluster_resources(), ray.available_resources()
        raise StageTimeout(no_room(name, training.num_workers, on_gpu, has, free)) from None
    logger.debug("fit in %s took %.1f s", storage, time.monotonic() - started)
    return metrics


def no_room(name: str, num_workers: int, on_gpu: bool, has: Mapping[str, float], free: Mapping[str, float]) -> str:
    """What a fit's workers waited for, given what the cluster has and what of it is free."""
    resource = "GPU" if on_gpu else "CPU"
    return (
        f"{name}: waited {float(os.environ[START_TIMEOUT]):.0f} s for room for {num_workers} training worker(s); each "
        f"takes 1 {resource}; the cluster has {has.get(resource, 0):g} {resource}, and {free.get(resource, 0):g} free "
        "now; the same command continues once there is room, with a smaller fleet or a larger cluster; "
        f"{START_TIMEOUT} waits longer"
    )


@contextmanager
def _naming_this_cluster() -> Iterator[None]:
    """Meanwhile the environment that Ray Train hands on to its controller says which cluster this is.

    What removes the workers of a lost controller asks whichever cluster it finds on the machine whether that lives. Of
    two runs on one machine it can find the other's, which knows of no such controller, and so it would end this fit.
    """
    before = os.environ.get(ADDRESS)
    ENV_VARS_TO_PROPAGATE.add(ADDRESS)
    os.environ[ADDRESS] = ray.get_runtime_context().gcs_address
    try:
        yield
    finally:
        if before is None:
            del os.environ[ADDRESS]
        else:
            os.environ[ADDRESS] = before


def _fitted(trainer: Callable[[], TorchTrainer], url: str, max_failures: int) -> dict[str, Any]:
    """Run it; before and after, the folder of its checkpoints is tidied. What a worker refused reaches the user."""
    checkpoints.tidy(url)
    try:
        result = _ended(trainer, max_failures)
    except ray.train.ControllerError as error:  # it writes Ray Train's list of checkpoints
        if isinstance(error.controller_failure, WorkerGroupStartupTimeoutError):
            raise error.controller_failure from None
        with refusing_full_disk(url):
            raise
    except ray.train.WorkerGroupError as error:
        causes = [cause for failure in error.worker_failures.values() for cause in (failure, *failure.args)]
        raise next((cause for cause in causes if isinstance(cause, RayRLError)), error) from None
    finally:
        checkpoints.tidy(url)
        checkpoints.tell(url)
    if result.error is not None:
        raise result.error
    return dict(result.metrics or {})


def _ended(trainer: Callable[[], TorchTrainer], max_failures: int) -> Any:
    """Run it to its end; again, if its workers were lost while they started, or its controller at any time.

    Ray Train has one limit for the former and for workers that find no room, which must not be waited for again, and
    does not start its controller again.
    """
    for num_failures in range(max_failures + 1):
        try:
            return trainer().fit()
        except (ray.train.ControllerError, RayActorError) as error:
            cause = error.controller_failure if isinstance(error, ray.train.ControllerError) else error
            is_lost = isinstance(cause, WorkerGroupStartupFailedError | RayActorError)
            if not is_lost or num_failures == max_failures:
                raise
            logger.warning("the training's controller, or workers that started, are lost; it goes on: %s", error)
    raise AssertionError("a fit ends or raises")


def _filesystem(url: str) -> tuple[FileSystem | None, str]:
    """For Ray Train: a remote place by fsspec, so that endpoint and keys come from one source; and the path on it."""
    fs, path = locate(url)
    return (None, url) if is_local(url) else (PyFileSystem(FSSpecHandler(fs)), path)


def _run(config: dict[str, Any]) -> None:
    _fit_url.set(config["fit_url"])
    config["loop"](config["job"], Rows(ray.train.get_dataset_shard(f"rank{rank()}")))


class Rows:
    """This worker's rows: call it for an epoch, and it gives them from the start.

    The first epoch's first block is asked for at once, so that Ray Data gets going beside the imports and the loading.
    """

    def __init__(self, shard: Any):
        self._shard = shard
        self._ahead = [ThreadPoolExecutor(1).submit(self._begin)]

    def __call__(self) -> Iterator[dict[str, Any]]:
        first, rest = self._ahead.pop().result() if self._ahead else self._begin()
        for table in chain(first, rest):
            yield from table.to_pylist()

    def _begin(self) -> tuple[list[Any], Iterator[Any]]:
        batches = iter(self._shard.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=2))
        first = next(batches, None)
        return ([] if first is None else [first]), batches


def rank() -> int:
    """This worker's rank."""
    return ray.train.get_context().get_world_rank()


def world_size() -> int:
    """Workers of this fit."""
    return ray.train.get_context().get_world_size()


def whole_checkpoints() -> list[str]:
    """Names of this fit's whole checkpoints, the newest first, the same on every rank. All ranks take part."""
    names: list[str] = []
    if rank() == 0:
        checkpoints.tidy(_fit_url.get())
        names = checkpoints.whole(_fit_url.get())[: checkpoints.NUM_KEPT]
    return broadcast_from_rank_zero(names)


def opened(name: str) -> AbstractContextManager[str]:
    """A local folder with a checkpoint in it, fetched once per node. All ranks take part."""
    filesystem, path = _filesystem(join(_fit_url.get(), name))
    checkpoint = Checkpoint(path, filesystem) if rank() == 0 else None
    return broadcast_from_rank_zero(checkpoint).as_directory()  # type: ignore[union-attr]  # one object, one download


def damaged(name: str, folder: str) -> bool:
    """Whether this rank's part of a checkpoint has changed since it was written; the driver will tell the user."""
    files = checkpoints.damaged(folder, rank(), world_size())
    if files:
        checkpoints.note(_fit_url.get(), name, files)
    return bool(files)


def report(metrics: dict[str, Any], save: Callable[[str], None]) -> None:
    """Save on every rank and register the checkpoint with Ray Train.

    Raises:
        DiskFull: the checkpoint does not fit; those before it are still there.
    """
    step = int(metrics["step"])
    what = f"the checkpoint of step {step}"
    with tempfile.TemporaryDirectory() as folder:
        with refusing_full_disk(folder, what):
            save(folder)
            checkpoints.seal(folder, step, rank(), world_size())
        with refusing_full_disk(_fit_url.get(), what):
            name = f"{checkpoints.PREFIX}{step:08d}_{uuid.uuid4().hex[:8]}"  # rank 0's counts
            ray.train.report(metrics, checkpoint=Checkpoint.from_directory(folder), checkpoint_dir_name=name)
