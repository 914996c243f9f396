"""The test question comes before the first GPU second of every start, also of a run that was finished before."""

import pytest

from rayrl.config import RunConfig
from rayrl.records import Prompt
from rayrl.runs.run import Run
from rayrl.runs.stage_table import stages_of
from rayrl.stages.labelling import try_out as module
from tests.fakes import made_up


@pytest.fixture
def asked(monkeypatch):
    """The questions that were asked, by what they try."""
    kinds = []
    monkeypatch.setattr(module, "_try", lambda oracle, what, questions: kinds.append((what, len(questions))))
    return kinds


def run_of(folder, oracle, **settings):
    tree = {
        "name": "t",
        "run_dir": str(folder),
        "policy": {"path": "model"},
        "pool": {"path": "pool.jsonl"},
        "sft": {"enabled": False},
        "oracle": oracle,
        "select": {"budget": 8},
    }
    return Run(config=RunConfig.model_validate(tree | settings), url=str(folder))


PROMPTS = [Prompt(id=f"p{i}", text="Tell.", rendered="Tell.") for i in range(3)]
HTTP = {"type": "http", "base_url": "http://a/v1", "model": "a"}


def test_a_finished_run_is_tried_out_too_since_its_budget_may_be_larger_now(tmp_path, asked):
    run = run_of(tmp_path, HTTP)
    for stage, _ in stages_of(run.config):
        run.finish(stage, "k", since=0.0, num_rows=1, metrics=made_up(stage.metrics), summary="done")
    module.try_out(run_of(tmp_path, HTTP, select={"budget": 16}), None, PROMPTS)
    assert asked == [("test question", 3)]
