"""The studies: which runs they finish, in which order, and what they read of them. No run is made here."""

import importlib
from argparse import Namespace
from dataclasses import replace
from pathlib import Path

import pytest

from rayrl.runs.stage_table import EVALUATE
from tests.report.made_up_runs import proxy_dpo_metrics, spent, write_manifest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def bench(monkeypatch):
    """Import a script of jobs/bench, whose folder is the first of sys.path when it runs."""
    monkeypatch.syspath_prepend(str(ROOT / "jobs" / "bench"))
    return importlib.import_module


@pytest.fixture
def options(tmp_path):
    config = str(ROOT / "jobs" / "configs" / "stories.toml")
    return Namespace(config=config, overrides=[f"run_dir={tmp_path}"])


@pytest.fixture
def study(bench, monkeypatch):
    """The study of proxy DPO, whose runs are finished by writing down their folder and what they share."""
    module = bench("study")
    module.made = []

    def finish(config, pipeline):
        module.made.append((Path(config.run_dir).name, config.reuse and Path(config.reuse).name))
        return config.run_dir

    monkeypatch.setattr(module, "finish", finish)
    return module


def test_a_variant_comes_after_the_run_that_it_shares_stages_with(study, options):
    study.finished(options, "random", 1)
    assert study.made == [("k-center-1", None), ("random-1", "k-center-1")]


def test_the_queries_of_a_study_are_those_of_all_rounds(study, options, tmp_path):
    evaluated = proxy_dpo_metrics()[EVALUATE]
    label = spent(128, budget=128)
    write_manifest(tmp_path / "k-center-0", EVALUATE, replace(evaluated, ledger=evaluated.ledger | {"label": label}))
    assert study.run(options, "k-center", 0).num_paid == 128


def test_a_run_without_its_evaluation_is_named(study, options, tmp_path):
    with pytest.raises(ValueError, match=r"k-center-0 has not finished evaluate; rerun the study"):
        study.run(options, "k-center", 0)
