"""A fit that gives up waiting for its workers, and its message."""

import signal

import pytest
import ray.train
from ray.train.torch import TorchTrainer
from ray.train.v2._internal.exceptions import WorkerGroupStartupFailedError, WorkerGroupStartupTimeoutError

from rayrl.config import SftConfig
from rayrl.errors import StageTimeout
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
