"""Trackers follow the curves: every step once, whatever fails; and what cannot work is refused before."""

import threading
import time

import pytest

from rayrl.config import RunConfig
from rayrl.errors import ConfigError
from rayrl.metrics.curves import MetricLog
from rayrl.metrics.tracking import Follower, curves, flat, following, started, tracked
from rayrl.runs.run import open_run


class Notebook:
    """A tracker that keeps what it is told, and fails when told so."""

    def __init__(self):
        self.steps = []
        self.failed = None
        self.away = False

    def log(self, stage, rows):
        if self.away:
            raise ConnectionError("no route to the tracker")
        self.steps += [(stage, row["step"], row["loss"]) for row in rows]

    def close(self, *, failed):
        self.failed = failed


def write(folder, stage, *steps):
    with MetricLog(str(folder), stage) as log:
        for step in steps:
            log.log(step, loss=step / 10)


def config_of(folder, **tracking):
    return RunConfig.model_validate(
        {
            "name": "t",
            "run_dir": str(folder),
            "policy": {"path": "model"},
            "pool": {"path": "pool.jsonl"},
            "sft": {"enabled": False},
            "select": {"budget": 8},
            "oracle": {"type": "scripted", "function": "json:dumps"},
            "tracking": tracking,
        }
    )


def test_every_step_is_passed_on_once(tmp_path):
    tracker = Notebook()
    follower = Follower(str(tmp_path), "notebook", tracker)
    follower.pass_on()
    write(tmp_path, "sft", 1, 2)
    follower.pass_on()
    write(tmp_path, "sft", 2, 3)  # resumed from the checkpoint after step 1
    write(tmp_path, "dpo", 1)
    follower.pass_on()
    follower.pass_on()
    assert sorted(tracker.steps) == [("dpo", 1, 0.1), ("sft", 1, 0.1), ("sft", 2, 0.2), ("sft", 3, 0.3)]


def test_a_restarted_driver_goes_on_where_it_was(tmp_path):
    write(tmp_path, "sft", 1, 2)
    Follower(str(tmp_path), "notebook", Notebook()).pass_on()
    write(tmp_path, "sft", 3)
    tracker, other = Notebook(), Notebook()
    Follower(str(tmp_path), "notebook", tracker).pass_on()
    Follower(str(tmp_path), "another", other).pass_on()
    assert [step for _, step, _ in tracker.steps] == [3]
    assert [step for _, step, _ in other.steps] == [1, 2, 3]


def test_a_tracker_that_is_away_gets_the_steps_later(tmp_path, caplog):
    tracker = Notebook()
    follower = Follower(str(tmp_path), "notebook", tracker)
    write(tmp_path, "sft", 1, 2)
    tracker.away = True
    follower.pass_on()
    assert "tracking.notebook: new steps are kept back: no route to the tracker" in caplog.text
    tracker.away = False
    follower.pass_on()
    assert [step for _, step, _ in tracker.steps] == [1, 2]


def test_a_later_rounds_curve_has_a_name_of_its_own(tmp_path):
    write(tmp_path, "dpo", 1)
    write(tmp_path / "rounds" / "2", "dpo", 1)
    assert [stage for stage, _ in curves(str(tmp_path))] == ["dpo", "dpo-2"]


def test_following_passes_on_meanwhile_and_at_the_end(tmp_path):
    tracker = Notebook()
    with following([Follower(str(tmp_path), "notebook", tracker)], poll_s=0.01):
        write(tmp_path, "sft", 1)
        until = time.monotonic() + 20
        while not tracker.steps and time.monotonic() < until:
            time.sleep(0.01)
        assert tracker.steps == [("sft", 1, 0.1)]
        write(tmp_path, "sft", 2)
    assert [step for _, step, _ in tracker.steps] == [1, 2]
    assert tracker.failed is False


def test_a_curve_that_cannot_be_read_ends_neither_the_following_nor_the_run(tmp_path, caplog):
    tracker = Notebook()
    write(tmp_path, "sft", 1)
    curve = tmp_path / "metrics" / "sft.jsonl"
    whole = curve.read_text()
    curve.write_text(whole.replace('"step"', '"stop"'))
    with following([Follower(str(tmp_path), "notebook", tracker)], poll_s=0.01):
        until = time.monotonic() + 20
        while "kept back" not in caplog.text and time.monotonic() < until:
            time.sleep(0.01)
        assert not tracker.steps
        curve.write_text(whole)
        while not tracker.steps and time.monotonic() < until:
            time.sleep(0.01)
        assert tracker.steps == [("sft", 1, 0.1)]
        curve.write_text("no JSON\n" + whole.replace('"step"', '"stop"'))
    assert tracker.failed is False


def test_a_run_does_not_wait_for_ever_for_a_tracker(tmp_path, caplog):
    tracker, away = Notebook(), threading.Event()
    tracker.log = lambda stage, rows: away.wait(20)
    write(tmp_path, "sft", 1)
    started = time.monotonic()
    with following([Follower(str(tmp_path), "notebook", tracker)], poll_s=0.01, end_s=0.1):
        pass
    assert time.monotonic() - started < 10 and "did not end within" in caplog.text
    away.set()


def test_a_tracker_that_cannot_be_reached_is_named_with_its_table():
    def start():
        raise ConnectionError("no route to the tracker")

    with pytest.raises(ConfigError, match=r"tracking.wandb must .*no route to the tracker"):
        started("wandb", start)


def test_a_failed_run_is_told_and_its_error_stays(tmp_path):
    tracker = Notebook()
    with (
        pytest.raises(ZeroDivisionError),
        following([Follower(str(tmp_path), "notebook", tracker)], poll_s=0.01),
    ):
        raise ZeroDivisionError
    assert tracker.failed is True


def test_nothing_follows_unless_asked(tmp_path):
    with tracked(open_run(config_of(tmp_path / "run"))):
        write(tmp_path / "run", "sft", 1)
    assert not list((tmp_path / "run").glob("tracking*"))


def test_a_run_goes_on_with_another_tracker(tmp_path):
    open_run(config_of(tmp_path / "run"))
    assert open_run(config_of(tmp_path / "run", mlflow={})).config.tracking.mlflow is not None


def test_settings_have_dotted_names():
    assert dict(flat({"a": {"b": 1, "c": {"d": None}}, "e": []})) == {"a.b": 1, "a.c.d": None, "e": []}


def test_mlflow_keeps_the_curves_in_the_runs_folder(tmp_path):
    mlflow = pytest.importorskip("mlflow")
    run = open_run(config_of(tmp_path / "run", mlflow={}))
    for steps in ((1, 2), (3,)):  # the second time as a restarted driver
        with tracked(run):
            write(tmp_path / "run", "sft", *steps)
    client = mlflow.MlflowClient(f"sqlite:///{run.url}/mlflow.db")
    (found,) = client.search_runs([client.get_experiment_by_name("rayrl").experiment_id])
    history = client.get_metric_history(found.info.run_id, "sft/loss")
    assert [(metric.step, metric.value) for metric in history] == [(1, 0.1), (2, 0.2), (3, 0.3)]
    assert (found.info.status, found.data.params["select.budget"]) == ("FINISHED", "8")


def test_wandb_works_offline(tmp_path):
    pytest.importorskip("wandb")
    with tracked(open_run(config_of(tmp_path / "run", wandb={}))):
        write(tmp_path / "run", "sft", 1, 2)
    assert list((tmp_path / "run" / "wandb").glob("offline-run-*/*.wandb"))
