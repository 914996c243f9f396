"""One `fit()` of Ray Train around a training loop. The only importer of ray.train.

A lost worker is restarted by Ray Train, and a lost driver continues the same fit from the same storage path. Ray Train
alone would also wait for ever for room for its workers, a minute at a time; here that wait has an end.

From which checkpoint a fit continues is decided by its workers (`rayrl.training.checkpoints`): Ray Train knows the last
checkpoint that was reported to it, and not whether it can be read.
"""

import logging
import os
import shutil
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from functools import partial
from itertools import chain
from typing import Any, Generic, Protocol, TypeVar

import pyarrow as pa
import ray.data
import ray.train
from pyarrow.fs import FileSystem, FSSpecHandler, PyFileSystem
from ray.exceptions import RayActorError
from ray.train import (
    Checkpoint,
    CheckpointConfig,
    CheckpointUploadMode,
    DataConfig,
    FailureConfig,
    Result,
    RunConfig,
    ScalingConfig,
)
from ray.train.collective import broadcast_from_rank_zero
from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.v2._internal.constants import ENV_VARS_TO_PROPAGATE
from ray.train.v2._internal.exceptions import (
    WorkerGroupStartupFailedError,
    WorkerGroupStartupTimeoutError,
    WorkerHealthCheckFailedError,
    WorkerHealthCheckTimeoutError,
)

from rayrl.config import TrainingConfig
from rayrl.engines.start import NO_GPUS
from rayrl.errors import RayRLError, StageTimeout, TrainingStopped
from rayrl.runs.storage import (
    exists,
    is_local,
    join,
    locate,
    move_files,
    read_json,
    refusing_full_disk,
    remove,
    write_json,
)
from rayrl.training import checkpoints

logger = logging.getLogger(__name__)

J = TypeVar("J")
R = TypeVar("R")

STOPPED = "stopped.json"
"""File with the reason for which a training stopped, beside the fit's checkpoints: a message to the driver."""
STREAM = "rows"
"""Ray Train's name for the training rows."""
START_TIMEOUT = "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"
"""Ray Train's environment variable: seconds for which a fit, or a restart of its workers, waits for room."""
START_TIMEOUT_S = 600.0
"""Unless the environment sets another: as long as a fleet waits for its engines."""
POLL = "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S"
"""Ray Train's environment variable: seconds between two polls of a fit's workers by its controller."""
POLL_S = 0.5
"""Unless the environment sets another. Every checkpoint, and the end of a fit, waits for the next poll."""
ADDRESS = "RAY_ADDRESS"
_DEATHS = (
    RayActorError,
    WorkerGroupStartupFailedError,
    WorkerHealthCheckFailedError,
    WorkerHealthCheckTimeoutError,
)
"""Errors of workers, or of a fit's controller, that are gone."""
_MAX_REASON = 300
"""Characters of Ray's own message that are shown."""
_fit_url: ContextVar[str] = ContextVar("fit_url")
"""In a worker: where this fit's checkpoints are."""
_last_write: ContextVar[threading.Event | None] = ContextVar("last_write", default=None)
"""In a worker: set when its part of the last checkpoint is written."""


class _Trainer(TorchTrainer):
    """`TorchTrainer` that leaves the process's handler of SIGINT in place.

    Ray Train's own would stay after the fit. It aborts nothing then, ends the process only at the third Ctrl-C, and
    with exit code 0, as if the run had finished.
    """

    def _register_sigint_handler(self, controller: object) -> None:
        del controller


class Trainer(Protocol):
    """The part of a `TorchTrainer` that runs it."""

    def fit(self) -> Result: ...


class Rows(Generic[R]):
    """The training's rows, which rank 0 reads and deals to all ranks. Call it once an epoch; it yields tables of rows.

    The first epoch's first block is asked for at once, so that Ray Data works beside the imports and the loading.
    """

    def __init__(self, stream: "ray.data.DataIterator | ray.data.Dataset | None"):
        self._stream = stream  # None on the ranks that are dealt theirs
        self._prefetched: Future[Iterator[pa.Table]] | None = None
        if stream is not None:
            self._prefetched = ThreadPoolExecutor(1).submit(self._started_tables)

    def __call__(self) -> Iterator[pa.Table]:
        if self._prefetched is None:
            return self._started_tables()
        tables = self._prefetched.result()
        self._prefetched = None
        return tables

    def _started_tables(self) -> Iterator[pa.Table]:
        """Start an epoch: return its blocks, the first of which is there."""
        assert self._stream is not None, "rank 0 alone reads"
        # No batch size: blocks as they are, without copying rows from one into another.
        tables = iter(
            self._stream.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=2)  # type: ignore[arg-type]
        )
        first = next(tables, None)
        return iter(()) if first is None else chain([first], tables)


def fit(
    loop: Callable[[J, Rows[Any]], None],
    job: J,
    training: TrainingConfig,
    stream: ray.data.Dataset,
    *,
    storage: str,
    on_gpu: bool,
    name: str = "fit",
) -> None:
    """Run a loop on every worker, to its end.

    Args:
        loop: the training function; called with `job` and the rows on every worker.
        job: a picklable record with all that the loop needs.
        training: workers and failures.
        stream: the training rows, in an order that never changes.
        storage: folder of the fit's checkpoints (any fsspec URL).
        on_gpu: one GPU per worker, else one CPU.
        name: of the fit on Ray's dashboard, and of its folder in `storage`.

    Raises:
        RayRLError: a worker's own, DiskFull and TrainingStopped among them; the whole checkpoints are still there.
        StageTimeout: there was no room for the workers in time; the message has their needs and what is free.
    """
    # Ray Train reads these in the driver, and hands them on to its controller.
    os.environ.setdefault(START_TIMEOUT, f"{START_TIMEOUT_S:g}")
    os.environ.setdefault(POLL, f"{POLL_S:g}")
    started = time.monotonic()
    fit_url = join(storage, name)
    filesystem, path = _filesystem(storage)
    new_trainer = partial(
        _Trainer,
        _run,
        train_loop_config={"loop": loop, "job": job, "fit_url": fit_url},
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
            # Workers without a GPU of their own would still see those of the machine, and DeepSpeed would take one.
            worker_runtime_env={} if on_gpu else {"env_vars": NO_GPUS},
            # A lost controller is `_fit_to_end`'s to restart.
            failure_config=FailureConfig(max_failures=training.max_failures, controller_failure_limit=0),
            checkpoint_config=CheckpointConfig(num_to_keep=checkpoints.NUM_KEPT),
        ),
        datasets={STREAM: stream},
        # Rank 0 reads the stream whole: a split of Ray's would give each rank blocks by how fast it asks for them.
        dataset_config=DataConfig(
            datasets_to_split=[], execution_options=ray.data.ExecutionOptions(preserve_order=True)
        ),
    )
    stopped_url = join(fit_url, STOPPED)
    remove(stopped_url)
    try:
        with _address_in_environment():
            _fit_with_tidy_folder(new_trainer, fit_url, training.max_failures)
    except WorkerGroupStartupTimeoutError:
        total, free = ray.cluster_resources(), ray.available_resources()
        raise StageTimeout(no_room(name, training.num_workers, on_gpu, total, free)) from None
    except (ray.train.TrainingFailedError, RayActorError) as error:
        reason = why_given_up(error, training.max_failures)
        if reason is None:
            raise
        raise TrainingStopped(f"{name}: {reason}") from None
    if exists(stopped_url):
        raise TrainingStopped(f"{name}: {read_json(stopped_url)}")
    logger.debug("fit in %s took %.1f s", storage, time.monotonic() - started)


def why_given_up(error: Exception, max_failures: int) -> str | None:
    """Say why a fit gave up, where its workers died or ran out of memory; None where their code raised.

    Args:
        error: Ray Train's.
        max_failures: losses that the fit survived.
    """
    failures = list(error.worker_failures.values()) if isinstance(error, ray.train.WorkerGroupError) else [error]
    failures = [each.controller_failure if isinstance(each, ray.train.ControllerError) else each for each in failures]
    rest = "the checkpoints are kept, and the same command goes on from the last one"
    for failure in failures:
        if type(failure).__name__ == "OutOfMemoryError":  # of torch, and of Ray
            return (
                f"a worker ran out of memory ({_first_line(failure)}); lower its micro_batch_tokens, set "
                f"gradient_checkpointing = true, or raise zero_stage or num_workers; {rest}"
            )
    for failure in failures:
        if isinstance(failure, _DEATHS):
            return (
                f"a worker died ({_first_line(failure)}), and more often than max_failures = {max_failures} allows; if "
                "its machine had no memory left, lower micro_batch_tokens or num_workers; "
                f"{rest}"
            )
    return None


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0][:_MAX_REASON]


def no_room(name: str, num_workers: int, on_gpu: bool, total: Mapping[str, float], free: Mapping[str, float]) -> str:
    """Describe what a fit's workers waited for, given the resources of the cluster and those that are free."""
    resource = "GPU" if on_gpu else "CPU"
    return (
        f"{name}: waited {float(os.environ[START_TIMEOUT]):.0f} s for room for {num_workers} training worker(s); each "
        f"takes 1 {resource}; the cluster has {total.get(resource, 0):g} {resource}, and {free.get(resource, 0):g} "
        "free now; the same command continues once there is room, with a smaller fleet or a larger cluster; "
        f"{START_TIMEOUT} waits longer"
    )


@contextmanager
def _address_in_environment() -> Iterator[None]:
    """Name this cluster in the environment that Ray Train hands on to its controller.

    The watchdog that removes the workers of a lost controller asks any cluster that it finds on the machine whether the
    controller is alive. With two runs on one machine it can find the other run's cluster, which knows of no such
    controller, and would end this fit.
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


def _fit_with_tidy_folder(new_trainer: Callable[[], Trainer], fit_url: str, max_failures: int) -> None:
    """Run a fit, and tidy the folder of its checkpoints before and after; raise the errors that workers raised."""
    checkpoints.tidy(fit_url)
    try:
        result = _fit_to_end(new_trainer, max_failures)
    except ray.train.ControllerError as error:
        if isinstance(error.controller_failure, WorkerGroupStartupTimeoutError):
            raise error.controller_failure from None
        # The controller writes Ray Train's list of checkpoints, and may be the one that finds the disk full.
        with refusing_full_disk(fit_url):
            raise
    except ray.train.WorkerGroupError as error:
        raise _own_error(error) or error from None
    finally:
        # Also after a failure: the next fit, and the user's disk, get whole checkpoints only.
        checkpoints.tidy(fit_url)
        checkpoints.remove_damaged(fit_url)
    if result.error is not None:
        raise result.error


def _own_error(error: ray.train.WorkerGroupError) -> RayRLError | None:
    """Find the first error of ours among those of the workers, which Ray Train wraps."""
    for failure in error.worker_failures.values():
        for cause in (failure, *failure.args):
            if isinstance(cause, RayRLError):
                return cause
    return None


def _fit_to_end(new_trainer: Callable[[], Trainer], max_failures: int) -> Result:
    """Run a fit to its end; again, if its workers were lost while they started, or its controller at any time.

    Ray Train has one limit for workers that are lost at their start and for those that find no room. The latter must
    not be waited for again. It does not start its controller again either.
    """
    for num_failures in range(max_failures + 1):
        try:
            return new_trainer().fit()
        except (ray.train.ControllerError, RayActorError) as error:
            cause = error.controller_failure if isinstance(error, ray.train.ControllerError) else error
            is_lost = isinstance(cause, WorkerGroupStartupFailedError | RayActorError)
            if not is_lost or num_failures == max_failures:
                raise
            logger.warning("the training's controller, or workers that started, are lost; it goes on: %s", error)
    raise AssertionError("a fit ends or raises")


def _filesystem(url: str) -> tuple[FileSystem | None, str]:
    """Return Ray Train's filesystem for a URL, and the path on it.

    A remote one is fsspec's, so that endpoint and keys come from one source; None is the local one.
    """
    filesystem, path = locate(url)
    return (None, url) if is_local(url) else (PyFileSystem(FSSpecHandler(filesystem)), path)


def _run(config: dict[str, Any]) -> None:
    """Run the loop in a worker."""
    _fit_url.set(config["fit_url"])
    rows = Rows(ray.train.get_dataset_shard(STREAM) if rank() == 0 else None)
    try:
        config["loop"](config["job"], rows)
    except TrainingStopped as error:
        # Raised on all ranks alike. Ray Train would run the fit again from its last checkpoint, to the same end, and
        # show every rank's stack each time.
        if rank() == 0:
            write_json(join(config["fit_url"], STOPPED), str(error))


def rank() -> int:
    """Return this worker's rank."""
    return ray.train.get_context().get_world_rank()


def world_size() -> int:
    """Return the number of workers of this fit."""
    return ray.train.get_context().get_world_size()


def whole_checkpoints() -> list[str]:
    """Return the names of this fit's whole checkpoints, the newest first, equal on every rank. All ranks take part."""
    names: list[str] = []
    if rank() == 0:  # others could see another state of the storage
        checkpoints.tidy(_fit_url.get())
        names = checkpoints.whole(_fit_url.get())[: checkpoints.NUM_KEPT]
    return broadcast_from_rank_zero(names)


def fetched(name: str) -> AbstractContextManager[str]:
    """Return a local folder with a checkpoint in it, fetched once per node. All ranks take part."""
    filesystem, path = _filesystem(join(_fit_url.get(), name))
    # Ray Train downloads once for equal objects only, so all ranks get rank 0's.
    checkpoint = broadcast_from_rank_zero(Checkpoint(path, filesystem) if rank() == 0 else None)
    assert checkpoint is not None
    return checkpoint.as_directory()


def is_damaged(name: str, folder: str) -> bool:
    """Return whether this rank's share of a checkpoint has changed since it was written; if so, the driver logs it."""
    files = checkpoints.changed_files(folder, rank(), world_size())
    if files:
        checkpoints.note_damage(_fit_url.get(), name, files)
    return bool(files)


def report(metrics: dict[str, float], save: Callable[[str], Callable[[], None]]) -> None:
    """Copy a checkpoint on every rank; it is written, and registered with Ray Train, while training goes on.

    A checkpoint waits for the one before it to be written, so that one copy at most is in memory. The last one is
    written before the fit ends. On a local disk a rank writes beside the checkpoint's folder, and renames.

    Args:
        metrics: of the checkpoint, its `step` among them.
        save: copies this rank's part, and returns a function that writes it into the given folder.

    Raises:
        DiskFull: the checkpoint does not fit; those before it are still there. A disk that is found full in the
            background ends the fit with the same error.
    """
    last_write = _last_write.get()
    if last_write is not None:
        last_write.wait()  # by a thread of this process: it ends, or the process does
    step, fit_url = int(metrics["step"]), _fit_url.get()
    own_rank, num_ranks = rank(), world_size()
    # Ray Train wants its own filesystem back: another thread's is not equal to it.
    context: Any = ray.train.get_context().get_storage()
    context._check_validation_file()  # refuses a local path that this node does not share with the driver's
    what = f"the checkpoint of step {step}"
    # The random end keeps a repeated step from writing into an older folder.
    name = f"{checkpoints.PREFIX}{step:08d}_{uuid.uuid4().hex[:8]}"
    with refusing_full_disk(fit_url, what):
        part = tempfile.mkdtemp(
            prefix=f"{name}.rank-{own_rank}.", dir=locate(fit_url)[1] if is_local(fit_url) else None
        )
    with refusing_full_disk(part, what):
        write = save(part)
    is_written = threading.Event()

    def persist(_: Checkpoint, shared_name: str) -> Checkpoint:
        try:
            with refusing_full_disk(part, what):
                write()
                list_file = checkpoints.seal(part, step, own_rank, num_ranks)
            with refusing_full_disk(fit_url, what):
                move_files(part, join(fit_url, shared_name), last=list_file)
        finally:
            shutil.rmtree(part, ignore_errors=True)  # of a part that is not moved
            is_written.set()
        return Checkpoint(context.build_checkpoint_path_from_name(shared_name), context.storage_filesystem)

    _last_write.set(is_written)
    ray.train.report(
        metrics,
        checkpoint=Checkpoint.from_directory(part),
        checkpoint_dir_name=name,  # all ranks get rank 0's
        checkpoint_upload_mode=CheckpointUploadMode.ASYNC,
        checkpoint_upload_fn=persist,
        delete_local_checkpoint_after_upload=False,  # it is moved
    )
