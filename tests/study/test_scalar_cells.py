"""Cells of a study of labels that train a scalar evaluator; and studies of them that are refused."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from rayrl.config import load_config
from rayrl.errors import ConfigError
from rayrl.pipelines.run_pipeline import Running
from rayrl.records import Checkpoint, Scored
from rayrl.runs.run import open_run
from rayrl.runs.stage_table import FIT_EVALUATOR
from rayrl.study.config import load_study
from rayrl.study.label_cells import Job
from rayrl.study.label_study import plan_labels
from rayrl.study.pool import STRIDE, StudyPool
from rayrl.study.results import Cell
from rayrl.study.scalar_cells import ScalarFits, Texts

MODEL = str(Path("jobs/quickstart/model").resolve())  # workers run in folders of their own
CONTEXT = 512


class TokenFleet:
    """Serves any scalar evaluator: the value of a response is its number of tokens."""

    concurrency = 1

    def call(self, method, checkpoint, inputs):
        assert method == "values" and checkpoint.version.startswith("evaluator-")
        return [float(len(tokens)) for tokens in inputs]


def services():
    fleet = TokenFleet()
    return SimpleNamespace(
        mode="overlap", on_gpu=False, dtype="float32", embedders=lambda *_: fleet, ready=lambda fleet: fleet
    )


def test_a_cell_trains_as_a_run_does_and_scores_the_held_out_responses(tmp_path, ray_cluster):
    settings = [("run_dir", str(tmp_path)), ("evaluator.type", "scalar"), ("evaluator.epochs", 1)]
    run = open_run(load_config("jobs/configs/quickstart.toml", settings=settings))
    num = 40
    ids = np.array([i // 4 * STRIDE + i % 4 for i in range(num)])
    pool = StudyPool(
        key="p",
        ids=ids,
        vectors=np.zeros((num, 2), np.float32),
        lengths=np.arange(num),
        prompt_ids=tuple(f"p{i}" for i in range(num // 4)),
    )
    job = Job(
        cell=Cell(arm="random", budget=12, seed=3),
        held_out=0.3,
        split_seed=0,
        num_batches=1,
        first=None,
        num_heads=4,
        evaluator="scalar",
        oracle="o",
        pool="p",
    )
    is_held_out = pool.held_out(0.3, 0)
    rows = np.flatnonzero(~is_held_out)[:12]
    held_out = np.flatnonzero(is_held_out)
    texts = {}
    for i in range(num):
        tokens = [5 + i % 7] * (CONTEXT + 1 if i == held_out[0] else 3 + i % 5)
        item = Scored(prompt=f"question {i // 4}", response=f"answer {i}", token_ids=tokens)
        texts[f"r{i}"] = Texts(prompt_id=f"p{i // 4}", response_id=f"r{i}", item=item)
    m1 = Checkpoint(path=MODEL, version="m1")
    fits = ScalarFits(now=Running(run=run, services=services(), oracle=None), m1=m1, texts=texts)

    predicted = fits._fitted(list(texts), pool, rows[:, None], rows % 5 * 1.0, job)
    assert np.isnan(predicted[~is_held_out]).all() and np.isnan(predicted[held_out[0]])
    assert predicted[held_out[1:]].tolist() == [3.0 + i % 5 for i in held_out[1:]]
    done = run.manifest(FIT_EVALUATOR)
    # The stage holds labels back for its own validation, as a run's does.
    assert 0 < done.num_rows < 12 and done.metrics.num_steps > 0

    fits._fitted(list(texts), pool, rows[:, None], rows % 5 * 1.0, job)
    assert run.manifest(FIT_EVALUATOR).finished_at == done.finished_at


def study_of(folder, *overrides):
    base = ("base=jobs/configs/quickstart.toml", f"study_dir={folder}", "evaluator=scalar", *overrides)
    return load_study("jobs/configs/studies/labels.toml", list(base))


def test_cells_are_named_by_what_they_train(tmp_path):
    keys = [
        {job.key for job in plan_labels(study_of(tmp_path, "set.evaluator.type=scalar", *more)).jobs}
        for more in ((), ("set.evaluator.learning_rate=1e-3",), ())
    ]
    assert keys[0] == keys[2] and keys[0].isdisjoint(keys[1])


def test_a_base_with_another_evaluator_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r'evaluator\.type of base must be "scalar", .* got "generative"; set\.evalu'):
        plan_labels(study_of(tmp_path))
    with pytest.raises(ConfigError, match=r"resources\.max_cells must be 1, got 2: each training uses the whole"):
        study_of(tmp_path, "resources.max_cells=2")
