"""Curves survive kills, resumes and object stores."""

import json
import time

import fsspec
import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from rayrl.metrics.curves import MetricLog, read_metrics


def log_and_resume(run_dir):
    """Steps 1 to 5, then a new process that begins again at 3; its events file is named after another second."""
    for steps, loss in ((range(1, 6), 1.0), (range(3, 5), 3.0)):
        with MetricLog(run_dir, "dpo") as log:
            for step in steps:
                log.log(step, loss=loss)
        time.sleep(1.1)


def test_one_json_object_per_step(tmp_path):
    with MetricLog(str(tmp_path), "sft") as log:
        log.log(1, loss=np.float32(0.5), lr=torch.tensor(1e-4))
        log.log(2, loss=0.25, lr=0)
    lines = (tmp_path / "metrics" / "sft.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2]
    first, _ = read_metrics(str(tmp_path / "metrics" / "sft.jsonl"))
    assert first == pytest.approx({"step": 1, "loss": 0.5, "lr": 1e-4})


def test_lines_are_on_disk_before_close(tmp_path):
    log = MetricLog(str(tmp_path), "sft")
    log.log(1, loss=1.0)
    assert read_metrics(str(tmp_path / "metrics" / "sft.jsonl")) == [{"step": 1, "loss": 1.0}]
    log.close()


def test_a_resumed_stage_supersedes_later_steps(tmp_path):
    with MetricLog(str(tmp_path), "dpo") as log:
        for step in range(1, 6):
            log.log(step, loss=1.0)
    with MetricLog(str(tmp_path), "dpo") as log:  # resumed from the checkpoint after step 2
        log.log(3, loss=3.0)
    rows = read_metrics(str(tmp_path / "metrics" / "dpo.jsonl"))
    assert [(r["step"], r["loss"]) for r in rows] == [(1, 1.0), (2, 1.0), (3, 3.0)]


def test_a_torn_line_costs_that_line_only(tmp_path):
    path = tmp_path / "metrics" / "dpo.jsonl"
    path.parent.mkdir()
    path.write_text('{"step": 1, "loss": 1.0}\n{"step": 2, "lo')
    with MetricLog(str(tmp_path), "dpo") as log:
        log.log(2, loss=2.0)
    assert [r["loss"] for r in read_metrics(str(path))] == [1.0, 2.0]


def test_a_value_that_is_not_finite_stays_valid_json(tmp_path):
    with MetricLog(str(tmp_path), "dpo") as log:
        log.log(1, loss=float("nan"))
    text = (tmp_path / "metrics" / "dpo.jsonl").read_text()
    line = json.loads(text, parse_constant=pytest.fail)
    assert (line["step"], line["loss"]) == (1, None)


def test_a_remote_run_appends_too():
    root = "memory://test_metrics"
    for step in (1, 2):
        with MetricLog(root, "sft") as log:
            log.log(step, loss=step)
    assert [r["step"] for r in read_metrics(root + "/metrics/sft.jsonl")] == [1, 2]
    fsspec.filesystem("memory").rm("/test_metrics", recursive=True)


def test_a_remote_runs_tensorboard_is_copied_there(tmp_path):
    fs = fsspec.filesystem("memory")
    log_and_resume("memory://test_events")
    fs.get("/test_events/tensorboard/dpo", f"{tmp_path}/dpo", recursive=True)
    fs.rm("/test_events", recursive=True)
    events = EventAccumulator(f"{tmp_path}/dpo")
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("dpo/loss")] == [(1, 1.0), (2, 1.0), (3, 3.0), (4, 3.0)]


def test_no_file_is_an_empty_curve(tmp_path):
    assert read_metrics(str(tmp_path / "metrics" / "sft.jsonl")) == []


def test_tensorboard_shows_the_resumed_curve(tmp_path):
    log_and_resume(str(tmp_path))
    events = EventAccumulator(str(tmp_path / "tensorboard" / "dpo"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("dpo/loss")] == [(1, 1.0), (2, 1.0), (3, 3.0), (4, 3.0)]
