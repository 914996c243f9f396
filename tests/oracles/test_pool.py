"""The pool pays once, within the budget, for every caller, however it is killed."""

import asyncio
import contextlib
import json
import os
import signal
import sqlite3
import subprocess
import sys
import uuid
from collections import Counter
from dataclasses import asdict, replace

import pytest

from rayrl.config import HttpOracleConfig, RubricConfig, ScriptedOracleConfig
from rayrl.errors import ConfigError, RunDirectoryError, UsdExhausted
from rayrl.models.judge_prompt import load_rubric
from rayrl.oracles.pool import OraclePool, start_oracle_pool
from rayrl.oracles.questions import BUDGET_EXHAUSTED
from rayrl.records import Judgement
from tests.judge_server import JudgeServer, Reply
from tests.oracles.test_ledger import answers

RUBRIC = load_rubric(RubricConfig())
KEY = "sk-very-secret-0123456789"


def http(server, **settings):
    defaults = {"base_url": server.url, "model": "judge-1", "api_key_env": None, "timeout_s": 60, "max_retries": 0}
    return HttpOracleConfig(**(defaults | settings))


def items(*indices):
    return [
        Judgement(prompt_id=f"p{i}", response_id=f"p{i}-0", prompt=f"prompt {i}", response=f"answer {i}")
        for i in indices
    ]


@contextlib.contextmanager
def opened(config, location, label=100, evaluate=100):
    pool = OraclePool(config, RUBRIC, location, {"label": label, "evaluate": evaluate})
    try:
        yield pool
    finally:
        pool.close()


def statuses(judgements):
    return [judgement.status for judgement in judgements]


def counts(summary, purpose="label"):
    left_out = ("budget", "input_tokens", "output_tokens", "abstentions")
    return {name: value for name, value in asdict(summary[purpose]).items() if value and name not in left_out}


def kept(location):
    """The paid judgements in a ledger without an owner."""
    return answers(location)


def test_judgements_come_back_in_order(server, location):
    server.plan = lambda index, question: Reply(text=f"Score: {int(question.split('answer ')[1].split()[0]) % 6}")
    with opened(http(server), location) as pool:
        judgements = asyncio.run(pool.judge(items(*range(20)), "label"))
    assert [(j.score, j.rationale) for j in judgements] == [(float(i % 6), "") for i in range(20)]
    assert [judgement.response_id for judgement in judgements] == [f"p{i}-0" for i in range(20)]


def test_how_many_questions_are_asked_at_once_may_change(server, location):
    server.plan = lambda index, question: Reply(wait=True)

    async def ask(pool):
        asked = asyncio.create_task(pool.judge(items(*range(20)), "label"))
        while server.num_active < 2:
            await asyncio.sleep(0.01)
        assert pool.resize(8, 8)["most"] == 8
        while server.num_active < 8:
            await asyncio.sleep(0.01)
        server.gate.set()
        return await asked

    with opened(http(server, max_concurrency=2), location) as pool:
        assert statuses(asyncio.run(asyncio.wait_for(ask(pool), 60))) == ["scored"] * 20
        assert server.max_active == 8
        assert (pool.resize(None, None)["most"], pool.state()["calls"]) == (2, 0)


def test_the_same_text_is_paid_once_within_and_across_calls(server, location):
    same = [replace(item, response_id=f"r{n}") for n, item in enumerate(items(1, 1, 1, 2))]
    with opened(http(server), location, label=2, evaluate=0) as pool:

        async def three_callers():
            return await asyncio.gather(
                pool.judge(same, "label"), pool.judge(items(2, 1), "label"), pool.judge(items(1, 2), "evaluate")
            )

        results = asyncio.run(three_callers())
        later = asyncio.run(pool.judge(items(2, 1), "evaluate"))
    assert server.num_asked == 2
    assert all(status == "scored" for result in (*results, later) for status in statuses(result))
    assert [judgement.response_id for judgement in results[0]] == ["r0", "r1", "r2", "r3"]
    assert {judgement.purpose for judgement in later} == {"evaluate"}


def test_64_concurrent_callers_never_exceed_the_budget(server, location):
    server.plan = lambda index, question: Reply(text="no score" if index % 3 else "Score: 2")
    with opened(http(server, max_concurrency=16), location, label=50) as pool:

        async def callers():
            calls = [pool.judge(items(*range(n, n + 5)), "label") for n in range(64)]
            return await asyncio.gather(*calls)

        results = asyncio.run(callers())
        summary = pool.summary()
    assert server.num_asked == 50 == summary["label"].spent
    assert max(Counter(server.responses()).values()) == 1
    assert server.max_active <= 16
    refused = [j for result in results for j in result if j.rationale == BUDGET_EXHAUSTED]
    assert refused and {(j.status, j.score, j.cost_usd) for j in refused} == {("abstained", None, 0.0)}


def test_refunds_during_a_call_are_spent_on_what_waits(server, location):
    server.plan = lambda index, question: Reply(status=500) if index < 5 else Reply()
    with opened(http(server), location, label=5) as pool:
        judgements = asyncio.run(pool.judge(items(*range(12)), "label"))
        summary = pool.summary()
    assert counts(summary) == {"spent": 5, "scored": 5, "refunded": 5}
    assert Counter(j.rationale == BUDGET_EXHAUSTED for j in judgements) == {False: 5, True: 7}


def test_questions_that_got_no_answer_and_cost_nothing_are_asked_once_more_at_the_end(server, location):
    server.plan = lambda index, question: Reply(status=503) if index in (2, 5) else Reply()
    with opened(http(server, max_concurrency=1), location, label=12) as pool:
        judgements = asyncio.run(pool.judge(items(*range(12)), "label"))
        assert counts(pool.summary()) == {"spent": 12, "scored": 12, "refunded": 2}
    assert statuses(judgements) == ["scored"] * 12
    assert server.responses()[-2:] == ["answer 2", "answer 5"]


def test_usd_budget_holds_and_what_was_paid_is_kept(server, location):
    prices = {"usd_per_1m_input": 1000.0, "usd_per_1m_output": 1000.0, "max_tokens": 20}
    server.plan = lambda index, question: Reply(usage=(len(question) // 4, 20))
    config = http(server, budget_usd=10.0, **prices)
    with opened(config, location) as pool:
        with pytest.raises(UsdExhausted, match=r"oracle\.budget_usd .* Raise it, and run the same command again"):
            asyncio.run(pool.judge(items(*range(90)), "label"))
        label = pool.summary()["label"]
    num_paid = len(kept(location))
    assert num_paid == label.scored == server.num_asked and 0 < num_paid < 90
    assert 7.5 < label.cost_usd <= 10.0  # below the limit by less than one upper bound
    with opened(config.model_copy(update={"budget_usd": 100.0}), location) as pool:
        judgements = asyncio.run(pool.judge(items(*range(90)), "label"))
    assert statuses(judgements) == ["scored"] * 90 and server.num_asked == 90


def test_an_evaluation_goes_on_with_what_the_usd_budget_paid_for(server, location):
    prices = {"usd_per_1m_input": 1000.0, "usd_per_1m_output": 1000.0, "max_tokens": 20}
    server.plan = lambda index, question: Reply(usage=(len(question) // 4, 20))
    with opened(http(server, budget_usd=10.0, **prices), location) as pool:
        judgements = asyncio.run(pool.judge(items(*range(90)), "evaluate"))
        spent = pool.summary()["evaluate"].cost_usd
    num_scored = statuses(judgements).count("scored")
    assert num_scored == server.num_asked and 0 < num_scored < 90
    assert sum(judgement.cost_usd for judgement in judgements) == pytest.approx(spent)
    assert 7.5 < spent <= 10.0


def test_failures_never_become_values(server, location):
    bad = [Reply(text="perhaps 4?"), Reply(status=500), Reply(drop=True), Reply(body="{}"), Reply(text="Score: 9")]
    server.plan = lambda index, question: bad[int(question.split("answer ")[1].split()[0]) % len(bad)]
    with opened(http(server, max_unreadable=100), location) as pool:
        judgements = asyncio.run(pool.judge(items(*range(25)), "label"))
    assert all(j.status == "abstained" and j.score is None and j.rationale for j in judgements)
    paid = kept(location)
    assert len(paid) == 20 and all(j.status == "abstained" for j in paid)  # error statuses are refunded


def test_paid_abstentions_are_not_asked_again_and_unbilled_ones_are(server, location):
    server.plan = lambda index, question: Reply(text="no score") if "answer 1\n" in question else Reply(status=500)
    with opened(http(server), location) as pool:
        asyncio.run(pool.judge(items(1, 2), "label"))
    server.plan = lambda index, question: Reply()
    with opened(http(server), location) as pool:
        assert statuses(asyncio.run(pool.judge(items(1, 2), "label"))) == ["abstained", "scored"]
    assert sorted(server.responses()) == ["answer 1", "answer 2", "answer 2", "answer 2"]


def test_a_caller_that_goes_away_does_not_waste_its_call(server, location):
    server.plan = lambda index, question: Reply(wait=True)
    with opened(http(server), location) as pool:

        async def impatient():
            caller = asyncio.create_task(pool.judge(items(1), "label"))
            await asyncio.to_thread(server.wait_for, 1)
            caller.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await caller
            server.gate.set()
            return await pool.judge(items(1), "label")

        assert statuses(asyncio.run(impatient())) == ["scored"]
    assert server.num_asked == 1


def test_secrets_are_not_in_the_ledger(server, location, monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", KEY)
    server.plan = lambda index, question: Reply(text=f"You sent {KEY}\nScore: 3" if index % 2 else f"{KEY}?")
    with opened(http(server, api_key_env="JUDGE_KEY"), location) as pool:
        asyncio.run(pool.judge(items(*range(6)), "label"))
        with sqlite3.connect(location) as db:
            dump = "\n".join(db.iterdump())
    assert server.headers[0]["authorization"].endswith(KEY)
    assert "You sent [api key]" in dump and KEY not in dump


def test_a_remote_ledger_is_written_before_each_call(server, tmp_path):
    location = f"file://{tmp_path}/remote/ledger.sqlite"
    unrecorded = []

    def plan(index, question):
        with sqlite3.connect(tmp_path / "remote" / "ledger.sqlite") as db:
            (num_reserved,) = db.execute("SELECT count(*) FROM attempts").fetchone()
        unrecorded.append(num_reserved < index + 1)
        return Reply()

    server.plan = plan
    with opened(http(server, max_concurrency=4), location) as pool:
        asyncio.run(pool.judge(items(*range(12)), "label"))
    assert len(unrecorded) == 12 and not any(unrecorded)
    with opened(http(server), location) as pool:
        assert counts(pool.summary()) == {"spent": 12, "scored": 12}


KILLED = """
import asyncio, json, sys
from rayrl.oracles.pool import OraclePool
from rayrl.config import HttpOracleConfig, RubricConfig
from rayrl.models.judge_prompt import load_rubric
from rayrl.records import Judgement
config, location = HttpOracleConfig(**json.loads(sys.argv[1])), sys.argv[2]
items = [Judgement(**item) for item in json.loads(sys.argv[3])]
pool = OraclePool(config, load_rubric(RubricConfig()), location, {"label": 30})
asyncio.run(pool.judge(items, "label"))
"""


def test_kill_9_in_the_middle_loses_at_most_what_was_in_flight(server, location):
    server.plan = lambda index, question: Reply(wait=index >= 10)
    config = http(server, max_concurrency=4)
    arguments = [config.model_dump_json(), location, json.dumps([asdict(item) for item in items(*range(20))])]
    process = subprocess.Popen([sys.executable, "-c", KILLED, *arguments], cwd=os.getcwd())
    server.wait_for(14)  # ten answered, four held back
    process.send_signal(signal.SIGKILL)
    process.wait(60)
    server.gate.set()
    with sqlite3.connect(location) as db:
        paid = {row[0] for row in db.execute("SELECT response FROM attempts WHERE state = 'scored'")}
    with opened(config, location, label=30) as pool:
        assert counts(pool.summary()) == {"spent": 14, "scored": 10, "lost": 4}
        judgements = asyncio.run(pool.judge(items(*range(20)), "label"))
        assert counts(pool.summary()) == {"spent": 24, "scored": 20, "lost": 4}
    assert statuses(judgements) == ["scored"] * 20
    asked = Counter(server.responses())
    assert server.num_asked == 24 and len(paid) == 10
    assert all(asked[response] == 1 for response in paid)


# As a Ray actor.


@pytest.fixture
def start(ray_cluster):
    """Starts pools under fresh names, and ends them."""
    import ray

    pools = []

    def start(config, location, name=None, **budgets):
        name = name or f"run-{uuid.uuid4().hex[:8]}"
        pool = start_oracle_pool(name, config, rubric=RUBRIC, ledger=location, budgets=budgets)
        pools.append(pool)
        return pool

    yield start
    for pool in pools:
        ray.kill(pool)


def test_the_actor_judges_and_reports(start, server, location):
    import ray

    pool = start(http(server), location, name="pool-under-test", label=5)
    judgements = ray.get(pool.judge.remote(items(*range(8)), "label"), timeout=60)
    assert statuses(judgements).count("scored") == 5
    again = ray.get(pool.judge.remote(items(*range(8)), "label"), timeout=60)
    assert again == judgements and len({j.key for j in judgements}) == 8
    by_name = ray.get_actor("pool-under-test-oracle")
    assert counts(ray.get(by_name.summary.remote(), timeout=60)) == {"spent": 5, "scored": 5}


def test_killed_actor_restarts_and_finishes_the_call(start, server, location):
    import ray

    server.plan = lambda index, question: Reply(wait=10 <= index < 14)
    pool = start(http(server, max_concurrency=4), location, label=30)
    pending = pool.judge.remote(items(*range(20)), "label")
    server.wait_for(14)
    ray.kill(pool, no_restart=False)
    judgements = ray.get(pending, timeout=120)
    assert statuses(judgements) == ["scored"] * 20
    assert counts(ray.get(pool.summary.remote(), timeout=60)) == {"spent": 24, "scored": 20, "lost": 4}
    asked = Counter(server.responses())
    assert server.num_asked == 24 and Counter(asked.values()) == {1: 16, 2: 4}


def test_a_lost_call_is_not_repeated_beyond_the_budget(start, server, location):
    import ray

    server.plan = lambda index, question: Reply(wait=index < 3)
    pool = start(http(server, max_concurrency=3), location, label=5)
    pending = pool.judge.remote(items(*range(5)), "label")
    server.wait_for(3)
    ray.kill(pool, no_restart=False)
    judgements = ray.get(pending, timeout=120)
    assert statuses(judgements).count("scored") == 2
    assert server.num_asked == 5


def test_a_ledger_that_cannot_be_opened_is_refused_without_a_traceback(start, server, location):
    with open(location, "wb") as file:
        file.write(b"something else entirely" * 100)
    with pytest.raises(RunDirectoryError, match=r"not a usable ledger") as caught:
        start(http(server), location, label=5)
    assert "Traceback" not in str(caught.value)


def test_an_unreachable_judge_is_refused_before_an_actor_exists(start, location):
    with JudgeServer() as gone:
        config = http(gone)
    with pytest.raises(ConfigError, match="cannot be reached"):
        start(config, location, label=5)


def test_a_name_in_use_is_refused(start, server, location, tmp_path):
    start(http(server), location, name="taken", label=5)
    with pytest.raises(RunDirectoryError, match="taken"):
        start(http(server), str(tmp_path / "other.sqlite"), name="taken", label=5)


def test_a_scripted_oracle_is_found_by_the_actor(start, location):
    import ray

    config = ScriptedOracleConfig(function="tests.oracles.length_oracle:judge")
    pool = start(config, location, label=5)
    judgements = ray.get(pool.judge.remote(items(1, 22, 333), "label"), timeout=60)
    assert [judgement.score for judgement in judgements] == [1.0, 2.0, 3.0]
