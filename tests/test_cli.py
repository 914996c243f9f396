"""The command line: what it prints, and how it refuses."""

import contextlib
import csv
import json
import os
import socket
import sqlite3
import subprocess
import sys
from dataclasses import replace

import pyarrow.parquet as pq
import pytest
from rich.console import Console

from rayrl.cli import fleet_table, main
from rayrl.errors import ResourceError
from rayrl.fleets.sizes import parse_sizes
from rayrl.oracles.ledger import Ledger
from rayrl.oracles.protocol import Verdict
from rayrl.runs.run import note_cluster
from rayrl.runs.stage_table import DPO, EVALUATE, QUERY, SFT
from tests.report.made_up_runs import (
    PROXY_DPO,
    edit_config,
    estimate,
    judgement,
    merged,
    proxy_dpo_metrics,
    query_metrics,
    spent,
    write_config,
    write_judgements,
    write_manifest,
    write_rlp_run,
)


@pytest.fixture
def run_dir(tmp_path):
    """A run whose manifests are few, and whose gain is not significant."""
    folder = tmp_path / "runs" / "first"
    write_config(folder, merged(PROXY_DPO, {"name": "first", "seed": 7, "labels": "shuffled"}))
    made_up = proxy_dpo_metrics()
    label = spent(8, budget=8, abstained=0)
    m2 = replace(made_up[EVALUATE].policies["m2"], difference=estimate(0.5, 0.4, 12))
    contents = {
        SFT: made_up[SFT],
        QUERY: query_metrics(label, {"3": 8}),
        EVALUATE: replace(made_up[EVALUATE], policies=made_up[EVALUATE].policies | {"m2": m2}, ledger={"label": label}),
    }
    for stage, content in contents.items():
        write_manifest(folder, stage, content, seconds=2.0, summary=f"[bold]{stage.name}[/bold] is done")
    return folder


def refusal(capsys, *arguments):
    with pytest.raises(SystemExit) as stopped:
        main(list(arguments))
    out, err = capsys.readouterr()
    assert (stopped.value.code, out) == (2, "")
    return err


def output(capsys, *arguments):
    with pytest.raises(SystemExit) as stopped:
        main(list(arguments))
    assert stopped.value.code == 0
    return capsys.readouterr().out


def test_status_shows_stages_money_and_gain(run_dir, capsys):
    printed = output(capsys, "status", str(run_dir))
    assert "[bold]sft[/bold] is done" in printed
    assert "not run" in printed
    assert "paid label queries 8 / 8, evaluation queries - / 128, gain over M1 +0.50 \u00b1 0.40\n" in printed
    assert "! The gain (+0.500 \u00b1 0.400) is not above two standard errors" in printed


def test_runs_lists_a_folder(run_dir, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    line = output(capsys, "runs", str(run_dir.parent)).splitlines()[1]
    assert line.split()[:10] == ["first", "proxy_dpo", "7", "evaluate", "8", "/", "8", "+0.50", "\u00b1", "0.40"]
    assert "the floor" in line


def test_a_run_of_another_version_does_not_hide_the_others(run_dir, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    other = run_dir.parent / "old"
    other.mkdir()
    (other / "config.json").write_text('{"name": "old"}')
    _, line, refused = output(capsys, "runs", str(run_dir.parent)).splitlines()
    assert line.split()[0] == "first" and refused.startswith(f"! {other}/config.json must be the resolved config")
    assert "old/config.json must be the resolved config" in refusal(capsys, "status", str(other))


def test_runs_of_an_empty_folder(tmp_path, capsys):
    assert output(capsys, "runs", str(tmp_path)) == f"no runs in {tmp_path}\n"


def test_report_is_rebuilt(run_dir, capsys):
    assert output(capsys, "report", str(run_dir)) == f"{run_dir}/report.html\n"
    assert (run_dir / "report.html").is_file()


def test_mistakes_get_one_message(tmp_path, capsys):
    assert refusal(capsys, "plan", str(tmp_path / "none.toml")).startswith("error: config file ")
    assert refusal(capsys, "status", str(tmp_path)).startswith("error: run_dir must be the folder of a run")
    assert refusal(capsys, "report", str(tmp_path)).startswith("error: run_dir must be the folder of a run")
    refused = refusal(capsys, "runs", str(tmp_path / "none"))
    assert refused.startswith("error: folder must be an existing folder")
    assert refused.endswith("; name the folder that holds your run directories\n")


def test_a_refusal_of_the_installed_command_has_no_traceback(tmp_path):
    command = [sys.executable, "-m", "rayrl.cli", "status", str(tmp_path)]
    finished = subprocess.run(command, capture_output=True, text=True, check=False)
    assert finished.returncode == 2
    assert finished.stderr.startswith("error: run_dir must be") and "Traceback" not in finished.stderr


def test_help_and_refusals_import_nothing_heavy(tmp_path):
    code = (
        "import sys; from rayrl.cli import main\n"
        "for arguments in (['--help'], ['plan', 'none.toml']):\n"
        "    try: main(arguments)\n"
        "    except SystemExit: pass\n"
        "print([m for m in ('torch', 'ray', 'vllm', 'transformers', 'matplotlib') if m in sys.modules])"
    )
    finished = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert finished.stdout.splitlines()[-1] == "[]"


@pytest.fixture
def rlp_run_dir(tmp_path):
    return write_rlp_run(tmp_path / "runs" / "second")


def test_status_of_the_second_pipeline(rlp_run_dir, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    printed = output(capsys, "status", str(rlp_run_dir))
    assert (
        "paid preference queries 300 / 300, evaluation queries 660 / 680, gain over M1 +0.79 \u00b1 0.09, " in printed
    )
    assert "over plain PPO +0.46 \u00b1 0.06" in printed
    assert "ppo_refreshed" in printed and "! One seed" in printed


def test_runs_of_both_pipelines_are_listed(run_dir, rlp_run_dir, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "140")
    _, first, second = output(capsys, "runs", str(run_dir.parent)).splitlines()
    assert first.split()[:2] == ["first", "proxy_dpo"]
    assert second.split() == ["made-up-rlp", "rlp", "3", "evaluate", "300", "/", "300", "+0.79", "\u00b1", "0.09"]


@pytest.mark.parametrize(
    ("size", "message"),
    [
        (
            "trainers=2",
            "a size must be ROLE=N with a ROLE of generators, embedders, evaluators, entailment, oracle, got",
        ),
        ("generators", "a size must be ROLE=N"),
        ("generators=", "the size of generators must be a number above 0 (generators=4), a range (generators=2-8), or"),
        ("generators=0", "auto for the size that the config gives, got '0'"),
        ("generators=8-2", "got '8-2'"),
        ("generators=-3", "got '-3'"),
        ("embedders=2.5", "got '2.5'"),
        ("oracle=2-8", "the size of oracle must be one number (oracle=8), got '2-8'"),
    ],
)
def test_sizes_that_say_nothing_are_refused_before_a_cluster_is_looked_for(capsys, size, message):
    assert message in refusal(capsys, "scale", "first", size).replace("\n", " ")


def test_sizes_are_read():
    sizes = parse_sizes(["generators=4", "embedders=1-8", "evaluators=auto", "oracle=32"])
    assert {role: (size.least, size.most) for role, size in sizes.items()} == {
        "generators": (4, 4),
        "embedders": (1, 8),
        "evaluators": (None, None),
        "oracle": (32, 32),
    }
    assert parse_sizes([]) == {}


def test_fleets_as_a_table(capsys):
    state = {"name": "first-generators", "ready": 1, "starting": 3, "draining": 0, "calls": 2, "waiting": 6}
    fixed = state | {"least": 4, "most": 4, "needs": "1 GPU, 0 CPU", "failure": None}
    failing = fixed | {"name": "first-embedders-mean", "least": 1, "failure": "Traceback ...\nOSError: no weights\n"}
    Console().print(fleet_table([fixed, failing]))
    head, first, second, failure = capsys.readouterr().out.splitlines()
    assert head.split() == ["fleet", "ready", "starting", "draining", "calls", "waiting", "size"]
    assert first.split() == ["first-generators", "1", "3", "0", "2", "6", "4"]
    assert second.split()[-1] == "1-4" and failure.strip() == "! OSError: no weights"


def test_status_shows_how_the_stage_under_way_goes_and_what_it_cost(run_dir, capsys):
    prices = {"usd_per_1m_input": 1.0, "usd_per_1m_output": 1.0, "budget_usd": 5.0}
    edit_config(run_dir, oracle=prices, dpo={"batch_size": 16})
    (run_dir / "stages" / DPO.name).mkdir()
    (run_dir / "metrics").mkdir()
    (run_dir / "metrics" / "dpo.json").write_text('{"num_steps": 40}')
    steps = "".join(json.dumps({"step": n, "at": 1000.0 + n}) + "\n" for n in range(1, 11))
    (run_dir / "metrics" / "dpo.jsonl").write_text(steps)
    printed = output(capsys, "status", str(run_dir))
    assert "\ndpo: 10 of 40 steps, 16 pairs/s, ETA 30.0 s; last sign " in printed
    assert "\nspent 0.00 USD / 5.00\n" in printed and "replicas" not in printed


def test_status_without_a_cluster_says_so_and_goes_on(run_dir, capsys, monkeypatch):
    def no_cluster(run):
        raise ResourceError("RAY_ADDRESS must name a running cluster, got auto")

    monkeypatch.setattr("rayrl.cli._control", no_cluster)
    printed = output(capsys, "status", str(run_dir), "--live")
    assert "replicas: RAY_ADDRESS must name a running cluster" in printed
    assert "! The gain" in printed


def test_a_run_is_looked_for_in_the_cluster_that_its_directory_names(run_dir):
    with socket.socket() as closed:  # bound, and nobody listens there
        closed.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{closed.getsockname()[1]}"
        note_cluster(str(run_dir), address)
        environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
        stop = [sys.executable, "-m", "rayrl.cli", "stop", str(run_dir)]
        ended = subprocess.run(stop, env=environment, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 2
    assert f"cannot be reached: it went on last in the cluster at {address}: " in ended.stderr


@pytest.fixture
def paid_run_dir(run_dir):
    """The run with a ledger: an answer, two abstentions, a refusal that cost nothing, a test question, and a call
    under way."""
    verdicts = [
        Verdict(score=3.0, rationale="good", cost_usd=0.01, input_tokens=7, output_tokens=2),
        Verdict(score=None, rationale="unclear", cost_usd=0.02),
        Verdict(score=None, rationale="unclear", cost_usd=0.02),
        Verdict(score=None, rationale="refused", billed=False),
    ]
    ledger = Ledger(str(run_dir / "ledger.sqlite"), {"label": 8, "test": 9})
    for index, verdict in enumerate(verdicts):
        ledger.commit(ledger.reserve(judgement(f"y{index}"), 0.02, stage="query"), verdict)
    tried = replace(judgement("test"), purpose="test")
    ledger.commit(ledger.reserve(tried, 0.5, stage="test"), Verdict(score=1.0, rationale="so", cost_usd=0.5))
    ledger.reserve(judgement("open"), 0.02, stage="query")
    ledger.flush()
    yield run_dir
    ledger.close()


def test_the_ledger_says_what_was_asked_by_whom_and_why_not(paid_run_dir, capsys):
    shown = output(capsys, "ledger", str(paid_run_dir))  # while its owner has it open
    row = next(line for line in shown.splitlines() if line.startswith("query "))
    assert row.split()[2:] == ["3", "1", "2", "0", "1", "1", "0", "0.07", "USD"]
    assert "query: 2 abstained: unclear" in shown


@pytest.mark.parametrize("suffix", ["parquet", "csv", "jsonl", "sqlite"])
def test_the_ledger_is_exported(paid_run_dir, tmp_path, capsys, suffix):
    target = tmp_path / f"answers.{suffix}"
    assert "6 attempts written" in output(capsys, "ledger", str(paid_run_dir), "--export", str(target))
    match suffix:
        case "parquet":
            rows = pq.read_table(target).to_pylist()
        case "csv":
            rows = list(csv.DictReader(target.read_text().splitlines()))
        case "jsonl":
            rows = [json.loads(line) for line in target.read_text().splitlines()]
        case _:
            with contextlib.closing(sqlite3.connect(target)) as db:
                db.row_factory = sqlite3.Row
                rows = [dict(row) for row in db.execute("SELECT * FROM attempts")]
    assert [row["state"] for row in rows] == ["scored", "abstained", "abstained", "refunded", "scored", "reserved"]
    assert (float(rows[0]["score"]), rows[0]["stage"], rows[0]["rationale"]) == (3.0, "query", "good")


def test_what_cannot_be_exported_is_said(run_dir, tmp_path, capsys):
    assert "must end in .parquet, .csv, .jsonl or .sqlite, got" in refusal(
        capsys, "ledger", str(run_dir), "--export", str(tmp_path / "a.txt")
    )
    assert "must be the ledger of a run" in refusal(capsys, "ledger", str(run_dir), "--export", str(tmp_path / "a.csv"))
    assert "nothing was asked" in output(capsys, "ledger", str(run_dir))


def test_status_says_how_the_oracle_answered(paid_run_dir, capsys):
    edit_config(paid_run_dir, oracle={"usd_per_1m_input": 1.0, "usd_per_1m_output": 1.0})
    shown = output(capsys, "status", str(paid_run_dir))
    assert "label queries: 3 asked, 1 answered, 2 abstained (2 unclear)" in shown
    assert "test queries: 1 asked, 1 answered, 0 abstained" in shown and "spent 0.57 USD" in shown


def test_the_meter_says_what_more_labels_would_buy(run_dir, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    write_judgements(run_dir)
    head, *rows, sentence = output(capsys, "meter", str(run_dir)).splitlines()
    assert head.split() == ["labels", "90%", "interval", "in", "brackets"]
    assert rows[0].split() == ["judgements", "95"] and rows[1].split() == ["of", "prompts", "48"]
    assert [row.split("  ")[0] for row in rows[2:]] == [
        "agreement with the oracle",
        "reachable",
        "reached of what is reachable",
        "labels that 80% of it takes",
        "labels that 90% of it takes",
        "labels that 95% of it takes",
        "the next 100 labels add",
    ]
    assert "95 judgements have reached" in sentence and "the next 100 add" in sentence


def test_the_meter_as_json(run_dir, capsys):
    write_judgements(run_dir)
    content = json.loads(output(capsys, "meter", str(run_dir), "--json"))
    assert content["advice"].startswith("95 judgements have reached")
    found = content["meter"]
    assert (found["num_labels"], found["num_prompts"], found["compares"]) == (95, 48, False)
    assert found["reachable"]["low"] <= found["reachable"]["value"] <= found["reachable"]["high"]
    assert set(found["labels_for"]) == {"0.8", "0.9", "0.95"} and len(found["band"]) == 33


def test_a_meter_without_vectors_is_refused_in_one_message(run_dir, tmp_path, capsys):
    write_judgements(run_dir)
    edit_config(run_dir, select={"strategy": "random"})
    for part in (run_dir / "stages" / "select" / "embeddings-0").iterdir():
        part.unlink()
    refused = refusal(capsys, "meter", str(run_dir))
    assert refused.startswith(f"error: {run_dir} has no vectors: select.strategy = 'random' embeds nothing")
    assert refused.count("\n") == 1
    assert refusal(capsys, "meter", str(tmp_path)).startswith("error: run_dir must be the folder of a run")


def test_the_meter_starts_no_ray(run_dir):
    write_judgements(run_dir)
    code = (
        "import sys, ray; from rayrl.cli import main\n"
        "try: main(['meter', sys.argv[1]])\n"
        "except SystemExit as ended: print(ended.code, ray.is_initialized())"
    )
    finished = subprocess.run([sys.executable, "-c", code, str(run_dir)], capture_output=True, text=True, check=True)
    assert finished.stdout.splitlines()[-1] == "0 False"
