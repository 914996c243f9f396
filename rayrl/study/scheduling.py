"""Cells of a study of labels as Ray tasks: as many at once as the cluster has CPUs for, or the study may take."""

import logging
import time
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError

from rayrl.errors import BudgetExhausted, DiskFull, JudgeFailed, RunDirectoryError, WaitingForPeople
from rayrl.study.config import ResourcesConfig
from rayrl.study.label_cells import Job, measure_cell
from rayrl.study.labels import asking
from rayrl.study.pool import StudyPool
from rayrl.study.results import Outcome, outcome_of

logger = logging.getLogger(__name__)

FATAL = (BudgetExhausted, DiskFull, JudgeFailed, RunDirectoryError, WaitingForPeople)
"""Errors that the next cell would meet as well: they end the study, which the same command continues."""
MAX_RETRIES = 2
"""A cell whose worker process dies is started again so often."""
FETCH_S = 60.0
"""Longest wait for the result of a cell that has ended."""


def run_jobs(
    jobs: Sequence[Job], pools: dict[str, Any], labels: Any, study_dir: str, resources: ResourcesConfig
) -> Iterator[Outcome]:
    """Run cells, and yield their outcomes as they end. A cell that fails ends no other.

    Args:
        jobs: the cells.
        pools: references to the pools in Ray's object store, by key.
        labels: the actor that answers.
        study_dir: where results go.
        resources: what the cells may take.

    Raises:
        JudgeFailed and others of `FATAL`: no cell could go on.
    """
    task: Any = ray.remote(run_job).options(num_cpus=resources.cpus_per_cell, max_retries=MAX_RETRIES)
    num_at_once = resources.max_cells or max(1, int(ray.cluster_resources().get("CPU", 1) // resources.cpus_per_cell))
    # Where CPUs are the limit, Ray keeps as many more in line: a core need not wait for this loop.
    num_submitted = num_at_once if resources.max_cells is not None else 2 * num_at_once
    started, num_seconds = time.monotonic(), 0.0
    waiting = deque(jobs)
    under_way: dict[Any, tuple[Job, float]] = {}
    while waiting or under_way:
        while waiting and len(under_way) < num_submitted:
            job = waiting.popleft()
            # One that waits for its turn waits for one cell, which takes no longer itself.
            longest_s = resources.timeout_s * (2 if len(under_way) >= num_at_once else 1)
            call = task.remote(job, pools[job.pool], labels, study_dir, resources.cpus_per_cell)
            under_way[call] = (job, time.monotonic() + longest_s)
        first_deadline = min(deadline for _, deadline in under_way.values())
        ended, _ = ray.wait(list(under_way), num_returns=1, timeout=max(0.0, first_deadline - time.monotonic()))
        for call in ended:
            job, _ = under_way.pop(call)
            outcome = _outcome(job, call)
            num_seconds += outcome.seconds
            yield outcome
        late = [call for call, (_, deadline) in under_way.items() if time.monotonic() > deadline]
        for call in late:
            job, _ = under_way.pop(call)
            ray.cancel(call, force=True)
            yield _failed(job, f"it took longer than resources.timeout_s, {resources.timeout_s:g} s")
    wall_s = time.monotonic() - started
    share = num_seconds / (num_at_once * wall_s)
    logger.info(
        "%d cells in %.1f s, %d at once, which were busy %.0f%% of it", len(jobs), wall_s, num_at_once, 100 * share
    )


def run_job(job: Job, pool: StudyPool, labels: Any, study_dir: str, num_threads: int) -> Outcome:
    """Run one cell, and keep its result.

    Raises:
        JudgeFailed and others of `FATAL`: no cell could go on.
    """
    import torch

    torch.set_num_threads(num_threads)  # numpy's are set by Ray, from the task's CPUs
    return outcome_of(job.cell, job.key, study_dir, lambda: measure_cell(job, pool, asking(labels)), fatal=FATAL)


def _outcome(job: Job, call: Any) -> Outcome:
    try:
        return ray.get(call, timeout=FETCH_S)
    except RayTaskError as error:
        if isinstance(error.cause, FATAL):
            raise error.cause from None
        return _failed(job, str(error.cause or error).strip().splitlines()[-1])
    except RayError as error:  # its worker died, again and again
        return _failed(job, f"its process ended: {str(error).strip().splitlines()[0]}")


def _failed(job: Job, reason: str) -> Outcome:
    logger.warning("cell failed: %s: %s", job.cell.title, reason)
    return Outcome(cell=job.cell, key=job.key, failure=reason)
