"""A judge that dies half-way, and comes back with another key and a lower rate limit: nothing is lost or repeated."""

import os

import pytest

from rayrl.config import load_config
from rayrl.errors import JudgeFailed
from rayrl.oracles import breaker
from rayrl.pipelines.run_pipeline import run_pipeline
from rayrl.preflight import check
from rayrl.report.ledger_counts import spending_by_stage
from rayrl.stages.labelling.query import query
from rayrl.stages.policy.sft import sft
from rayrl.stages.sampling.generate import generate
from rayrl.stages.sampling.pool import read_pool
from rayrl.stages.selection.select import select
from rayrl.study.ledger import find_ledger
from tests.judge_server import JudgeServer, Reply
from tests.pipelines.test_proxy_dpo import ROOT, SMALL, rows, written_stages

DEAD = Reply(status=401, text="Incorrect API key provided")


def until_select(run, services, oracle):
    """The first stages of proxy DPO, up to the one that pays."""
    pool = read_pool(run)
    m1 = sft(run, services)
    return select(run, services, m1, generate(run, services, m1, pool))


def until_query(run, services, oracle):
    """And that one."""
    query(run, oracle, until_select(run, services, oracle))


def label(folder, server, pipeline=until_query, reuse=None, **oracle):
    os.chdir(ROOT)
    settings = {"type": '"http"', "base_url": f'"{server.url}"', "model": '"judge-1"', "api_key_env": '"none"'}
    table = ", ".join(f"{name} = {value}" for name, value in (settings | oracle).items())
    overrides = [*SMALL, f"run_dir={folder}", f"name={folder.name}", "sft.enabled=false", f"oracle={{{table}}}"]
    overrides += [f"reuse={reuse}"] if reuse else []
    config = load_config(ROOT / "jobs/configs/quickstart.toml", overrides)
    run_pipeline(config, check(config, cluster={"CPU": 4.0}), pipeline, ray_start_s=0.0)
    return folder


def answered(index, question):
    """A score that only the question decides."""
    return Reply(text=f"Because.\nScore: {len(question) % 6}")


def test_a_judge_that_dies_half_way_and_comes_back_ends_in_the_same_table(ray_cluster, tmp_path, monkeypatch):
    monkeypatch.setattr(breaker, "PROBE_WAITS_S", (0.01, 0.02))
    with JudgeServer(answered) as well:
        selected = label(tmp_path / "selected", well, until_select)
        assert well.num_asked == 1  # the test question
        undisturbed = label(tmp_path / "well", well, reuse=selected)
        assert well.num_asked == 2 + 24
        label(tmp_path / "well", well, reuse=selected)
        assert well.num_asked == 2 + 24  # the ledger knows the test question, too

    (tmp_path / "first").write_text("sk-first")
    (tmp_path / "second").write_text("sk-second")
    with JudgeServer(lambda index, question: answered(index, question) if index < 11 else DEAD) as server:
        key = {"api_key_env": f'"file:{tmp_path}/first"', "max_concurrency": 4}
        with pytest.raises(JudgeFailed, match="401") as stopped:
            label(tmp_path / "mended", server, reuse=selected, **key)
        assert "Incorrect API key provided" in str(stopped.value) and "sk-" not in str(stopped.value)
        assert "query" not in written_stages(tmp_path / "mended")
        num_asked = server.num_asked
        assert num_asked <= 11 + 4 + 8
        server.plan = answered
        operation = {"requests_per_minute": 6000, "timeout_s": 30, "max_concurrency": 2}
        key = {"api_key_env": f'"file:{tmp_path}/second"'}
        mended = label(tmp_path / "mended", server, reuse=selected, **key, **operation)
        assert server.num_asked == num_asked + 24 - 10  # ten were answered, after the test question
        assert server.headers[-1]["authorization"] == "Bearer sk-second"

    assert rows(mended, "query") == rows(undisturbed, "query")
    by_stage = spending_by_stage(*find_ledger(str(mended)))
    found = {stage: (counts.spent, counts.scored, counts.abstained) for (stage, _), counts in by_stage.items()}
    assert found == {"test": (1, 1, 0), "query": (24, 24, 0)}


def test_a_judge_without_a_key_is_refused_before_the_first_stage(ray_cluster, tmp_path, monkeypatch):
    monkeypatch.setattr(breaker, "PROBE_WAITS_S", (0.01, 0.02))
    with JudgeServer(lambda index, question: DEAD) as server, pytest.raises(JudgeFailed, match="401"):
        label(tmp_path / "run", server)
    assert written_stages(tmp_path / "run") == set()
    assert server.num_asked == 3  # the question, and two probes
