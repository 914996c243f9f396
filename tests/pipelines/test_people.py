"""A run asks people: it parks, goes on with what they answered, asks nothing twice, and tells who said what."""

import asyncio
import os
import subprocess
import sys
import threading
import time
from dataclasses import asdict

import pytest

from rayrl.config import load_config
from rayrl.errors import WaitingForPeople
from rayrl.oracles.pool import OraclePool
from rayrl.pipelines.command_line import WAITING_EXIT_CODE, stoppable_command
from rayrl.pipelines.people import wait_for_people
from rayrl.pipelines.run_pipeline import run_pipeline
from rayrl.preflight import check
from rayrl.preflight.plan import render_plan
from rayrl.report.page import write_report
from rayrl.runs.run import note_waiting, noted_waiting
from tests.oracles.people.test_sheet import fill, rows_of
from tests.oracles.people.test_waiting import RUBRIC, items
from tests.pipelines.test_failed_judge import until_query
from tests.pipelines.test_proxy_dpo import ROOT, SMALL, written_stages


def config_of(folder, people="", **settings):
    overrides = [*SMALL, f"run_dir={folder}", f"name={folder.name}", "sft.enabled=false", "evaluate.budget=0"]
    overrides += [f'oracle={{type = "sheet", path = "{folder}.csv"{people}}}']
    return load_config(ROOT / "jobs/configs/quickstart.toml", [*overrides, *(f"{k}={v}" for k, v in settings.items())])


def start(config):
    os.chdir(ROOT)
    run_pipeline(config, check(config, cluster={"CPU": 4.0}), until_query, ray_start_s=0.0)


def test_a_run_parks_and_goes_on_with_what_people_answered(ray_cluster, tmp_path, capsys):
    folder, path = tmp_path / "asks-people", tmp_path / "asks-people.csv"
    config = config_of(folder)
    with pytest.raises(WaitingForPeople, match=r"0 of 24 questions of query are answered, and 24 are needed\n.*csv"):
        start(config)
    assert "select" in written_stages(folder) and "query" not in written_stages(folder)
    assert noted_waiting(str(folder))["num_needed"] == 24
    shown = subprocess.run([sys.executable, "-m", "rayrl.cli", "status", folder], capture_output=True, text=True)
    assert "waiting for people: 0 of 24" in shown.stdout and str(path) in shown.stdout

    fill(path, "score", [number % 6 for number in range(23)])
    with pytest.raises(WaitingForPeople, match="23 of 24"):
        start(config)
    assert len(rows_of(path)) == 1 + 24
    fill(path, "score", [*(number % 6 for number in range(23)), "cannot say"])
    start(config)
    assert "query" in written_stages(folder)
    assert noted_waiting(str(folder)) is None

    facts = write_report(str(folder))
    assert (facts.paid.label.spent, facts.paid.label.scored, facts.paid.label.abstained) == (24, 23, 1)
    ((person,), num) = facts.people.people, facts.people.num_questions
    assert (person.num_answers, person.num_cannot_say, num) == (24, 1, 24)
    page = (folder / "report.html").read_text()
    assert "What people said" in page and "<td>person 1</td>" in page.replace(' class="text"', "")


def test_the_plan_says_who_is_asked_and_that_the_run_parks(tmp_path):
    plan = render_plan(
        check(config_of(tmp_path / "planned", ", usd_per_answer = 0.5, enough = 0.9"), cluster={"CPU": 4})
    )
    assert "the run parks until 90% of a stage's questions are answered" in " ".join(plan.split())
    assert "12.00 USD" in plan


def test_a_parked_command_ends_with_75_and_one_screen(capsys):
    def command(stopping):
        raise WaitingForPeople("waiting for people: 1 of 2 questions\n  they lie in questions.csv")

    assert stoppable_command(command) == WAITING_EXIT_CODE == 75
    said = capsys.readouterr().err
    assert said.startswith("waiting for people: 1 of 2") and "the same command continues it" in said
    assert "Traceback" not in said and len(said.splitlines()) < 10


def test_whoever_waits_looks_again_and_survives_a_bad_cell(tmp_path, monkeypatch, caplog):
    config = config_of(tmp_path / "waits", ", poll_s = 0.05")
    path = tmp_path / "waits.csv"
    pool = OraclePool(config.oracle, RUBRIC, str(tmp_path / "ledger.sqlite"), {"label": 9}, "run")
    with pytest.raises(WaitingForPeople):
        asyncio.run(pool.judge(items(2), "label", "query"))
    note_waiting(str(tmp_path / "waits"), asdict(pool.waiting()))
    pool.close()
    waiter = threading.Thread(target=wait_for_people, args=[config], daemon=True)
    with caplog.at_level("INFO"):
        waiter.start()
        for answers in (["what?"], [3]):
            fill(path, "score", answers)
            time.sleep(0.3)
            assert waiter.is_alive()
        fill(path, "score", [3, 4])
        waiter.join(20)
    assert not waiter.is_alive()
    assert "got 'what?'" in caplog.text and "1 of 2 questions that are needed" in caplog.text
