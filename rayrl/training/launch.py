"""One `fit()` of Ray Train around a training loop. The only importer of ray.train.

A lost worker is Ray Train's to restart, and so is a lost driver: the same storage path continues the same fit.
"""

import logging
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from itertools import chain
from typing import Any

import ray.data
import ray.train
from ray.train import Checkpoint, CheckpointConfig, DataConfig, FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer

from rayrl.config import TrainingConfig

logger = logging.getLogger(__name__)

Stream = Callable[[int, int], "ray.data.Dataset"]
"""(rank, world size) -> the rows of that rank, in an order that never changes."""


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
    """
    started = time.monotonic()
    options = ray.data.ExecutionOptions(preserve_order=True)
    trainer = TorchTrainer(
        _run,
        train_loop_config={"loop": loop, "job": job},
        scaling_config=ScalingConfig(
            num_workers=training.num_workers,
            use_gpu=on_gpu,
            resources_per_worker=None if on_gpu else {"CPU": 1},
        ),
        torch_config=TorchConfig(backend=None if on_gpu else "gloo"),
        run_config=RunConfig(
            name=name,
            storage_path=storage,
            failure_config=FailureConfig(max_failures=training.max_failures),
            checkpoint_config=CheckpointConfig(num_to_keep=2),
        ),
        datasets={f"rank{r}": stream(r, training.num_workers) for r in range(training.num_workers)},
        dataset_config=DataConfig(datasets_to_split=[], execution_options=options),
    )
    result = trainer.fit()
    if result.error is not None:
        raise result.error
    logger.debug("fit in %s took %.1f s", storage, time.monotonic() - started)
    return dict(result.metrics or {})


def _run(config: dict[str, Any]) -> None:
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


def restored() -> AbstractContextManager[str | None]:
    """Folder of the newest checkpoint of this fit, or None."""
    checkpoint = ray.train.get_checkpoint()
    return nullcontext(None) if checkpoint is None else checkpoint.as_directory()


def report(metrics: dict[str, Any], save: Callable[[str], None]) -> None:
    """Save on every rank and register the checkpoint with Ray Train."""
    with tempfile.TemporaryDirectory() as folder:
        save(folder)
        ray.train.report(metrics, checkpoint=Checkpoint.from_directory(folder))
