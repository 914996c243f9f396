"""The ledger of a study: where it is, and what it knows of the study's runs."""

from dataclasses import replace

import pytest

from rayrl.errors import RunDirectoryError
from rayrl.oracles.ledger import Ledger
from rayrl.oracles.protocol import Verdict
from rayrl.records import Judgement
from rayrl.report.ledger_counts import spending_by_stage
from rayrl.runs import storage
from rayrl.study.config import load_study
from rayrl.study.ledger import find_ledger, note_ledger

JUDGEMENT = Judgement(prompt_id="p", response_id="r", prompt="?", response="!", oracle="o", purpose="label")


def pay(place, run, *keys):
    ledger = Ledger(str(place), {"label": 9}, run=run)
    for key in keys:
        reserved = ledger.reserve(replace(JUDGEMENT, key=key), 0.0, stage="query")
        ledger.commit(reserved, Verdict(score=1.0, rationale="", cost_usd=0.5))
    ledger.close()


def test_the_runs_of_a_study_are_counted_together_and_no_others(tmp_path):
    folder = tmp_path / "study"
    for name, identifier in (("pool-1", "a"), ("cells/random-8-seed0-x", "b"), ("cells/y", "c")):
        storage.write_json(str(folder / name / "identity.json"), {"id": identifier})
    (folder / "cells" / "z.parquet").write_bytes(b"a result")
    place = tmp_path / "shared.sqlite"
    for run, keys in (("a", "1"), ("b", "23"), ("c", "4"), ("another study's", "567")):
        pay(place, run, *keys)
    overrides = ["base=jobs/configs/quickstart.toml", f"study_dir={folder}"]
    note_ledger(load_study("jobs/configs/studies/proxy_dpo.toml", overrides), str(place))
    location, runs = find_ledger(str(folder))
    assert (location, sorted(runs)) == (str(place), ["a", "b", "c"])
    (found,) = spending_by_stage(location, runs).values()
    assert (found.spent, found.scored, found.cost_usd) == (4, 4, 2.0)


def test_a_study_that_noted_nothing_has_its_own_ledger(tmp_path):
    storage.write_json(str(tmp_path / "identity.json"), {"id": "a"})
    pay(tmp_path / "ledger.sqlite", "a", "1")
    assert find_ledger(str(tmp_path)) == (str(tmp_path / "ledger.sqlite"), ["a"])


def test_another_folder_is_refused(tmp_path):
    with pytest.raises(RunDirectoryError, match=r"folder of a run \(with config\.json in it\) or of a study"):
        find_ledger(str(tmp_path))
