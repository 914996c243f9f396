"""A fit that gives up waiting for its workers, and its message."""

import os
import signal

import pytest
import ray.train
from ray.train.torch import TorchTrainer
from ray.train.v2._internal.exceptions import WorkerGroupStartupFailedError, WorkerGroupStartupTimeoutError

from rayrl.config import SftConfig
from rayrl.errors import StageTimeout, TrainingStopped
from rayrl.training import launch


class Trainer:
    """Fails as it is told, one failure a fit, and then ends."""

    def __init__(self, *failures):
        self.failures, self.num_fits = list(failures), 0

    def fit(self):
        self.num_fits += 1
        if self.failures:
            raise ray.train.ControllerError(self.failures.pop(0))
        return "ended"


def lost():
    return WorkerGroupStartupFailedError("a node died")


def test_workers_lost_at_their_start_are_started_again_and_not_for_ever():
    trainer = Trainer(lost(), lost())
    assert (launch._fit_to_end(lambda: trainer, 2), trainer.num_fits) == ("ended", 3)
    trainer = Trainer(lost(), lost(), lost())
    with pytest.raises(ray.train.ControllerError, match="a node died"):
        launch._fit_to_end(lambda: trainer, 2)


def test_workers_without_room_end_the_fit(tmp_path):
    trainer = Trainer(WorkerGroupStartupTimeoutError(2))
    with pytest.raises(WorkerGroupStartupTimeoutError):
        launch._fit_with_tidy_folder(lambda: trainer, f"{tmp_path}/fit", 2)
    assert trainer.num_fits == 1


def test_a_wait_for_room_says_what_is_missing(monkeypatch):
    monkeypatch.setenv(launch.START_TIMEOUT, "600")
    has, free = {"CPU": 64.0, "GPU": 8.0}, {"CPU": 60.0}
    said = launch.no_room("mine-dpo", 4, True, has, free)
    assert said.startswith("mine-dpo: waited 600 s for room for 4 training worker(s); each takes 1 GPU; ")
    assert "; the cluster has 8 GPU, and 0 free now; " in said
    assert "each takes 1 CPU; the cluster has 64 CPU, and 60 free" in launch.no_room("mine-sft", 4, False, has, free)


def nothing(job, rows):
    raise AssertionError("there is no room to start in")


@pytest.mark.slow
def test_a_fit_that_finds_no_room_ends(ray_cluster, tmp_path, monkeypatch):
    monkeypatch.setenv(launch.START_TIMEOUT, "3")
    training = SftConfig(num_workers=99)
    with pytest.raises(StageTimeout, match=r"mine-sft: waited 3 s for room for 99 training .* the cluster has 4 CPU"):
        launch.fit(
            nothing,
            None,
            training,
            ray.data.from_items([{"id": 0}]),
            storage=f"{tmp_path}/fit",
            on_gpu=False,
            name="mine-sft",
        )


def dies(job, rows):
    os.kill(os.getpid(), signal.SIGKILL)


def test_workers_that_die_end_in_one_message(ray_cluster, tmp_path):
    training = SftConfig(max_failures=0)
    rows = ray.data.from_items([{"id": 0}])
    with pytest.raises(TrainingStopped) as stopped:
        launch.fit(dies, None, training, rows, storage=f"{tmp_path}/fit", on_gpu=False, name="mine-sft")
    message = str(stopped.value)
    assert message.startswith("mine-sft: a worker died (") and "max_failures = 0 allows" in message
    assert "goes on from the last one" in message and "Traceback" not in message and len(message.splitlines()) == 1


class OutOfMemoryError(RuntimeError):
    """As torch calls its own."""


def test_a_worker_without_memory_is_told_what_to_lower():
    full = ray.train.WorkerGroupError("full", {0: OutOfMemoryError("CUDA out of memory. Tried to ...\nand more")})
    reason = launch.why_given_up(full, 3)
    assert reason is not None and "(CUDA out of memory. Tried to ...); lower its micro_batch_tokens" in reason
    assert launch.why_given_up(ray.train.WorkerGroupError("bug", {0: ValueError("ours")}), 3) is None
    assert launch.why_given_up(ray.train.ControllerError(lost()), 2).startswith("a worker died (a node died), and more")


def test_a_fit_leaves_the_handler_of_ctrl_c_in_place():
    """Ray Train registers one in this method, which must still be the one that is left out."""
    assert callable(TorchTrainer._register_sigint_handler)
    before = signal.getsignal(signal.SIGINT)
    trainer = launch._Trainer(lambda: None)
    trainer._register_sigint_handler(None)
    assert signal.getsignal(signal.SIGINT) == before
    TorchTrainer._register_sigint_handler(trainer, None)
    try:
        assert signal.getsignal(signal.SIGINT) != before
    finally:
        signal.signal(signal.SIGINT, before)
