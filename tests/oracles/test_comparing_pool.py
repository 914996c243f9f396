"""Comparisons keep the promises of judgements: one budget, each question paid once, and the order is the question."""

import asyncio
import contextlib
import sqlite3
from collections import Counter
from dataclasses import asdict, replace

import pytest

from rayrl.config import HttpOracleConfig, RubricConfig, ScriptedOracleConfig
from rayrl.models.judge_prompt import load_rubric
from rayrl.oracles.pool import OraclePool
from rayrl.oracles.questions import BUDGET_EXHAUSTED
from rayrl.records import Comparison, Judgement
from tests.judge_server import JudgeServer, Reply
from tests.oracles.test_ledger import answers as kept

RUBRIC = load_rubric(RubricConfig())


@pytest.fixture
def server():
    with JudgeServer(lambda index, question: Reply(text="Better: first")) as server:
        yield server


def http(server, **settings):
    defaults = {"base_url": server.url, "model": "judge-1", "api_key_env": None, "timeout_s": 60, "max_retries": 0}
    return HttpOracleConfig(**(defaults | settings))


def item(index, first="a", second="b"):
    return Comparison(
        prompt_id=f"p{index}",
        first_id=f"p{index}-{first}",
        second_id=f"p{index}-{second}",
        prompt=f"prompt {index}",
        first=f"{first} {index}",
        second=f"{second} {index}",
    )


def turned(index):
    assert item(index).turned() == item(index, "b", "a")
    return item(index).turned()


@contextlib.contextmanager
def opened(config, location, label=100):
    pool = OraclePool(config, RUBRIC, location, {"label": label, "evaluate": 100})
    try:
        yield pool
    finally:
        pool.close()


def counts(pool, purpose="label"):
    left_out = ("budget", "input_tokens", "output_tokens", "abstentions")
    return {name: value for name, value in asdict(pool.summary()[purpose]).items() if value and name not in left_out}


def test_comparisons_come_back_in_order_and_name_both_responses(server, location):
    words = ("first", "second", "tie")
    server.plan = lambda index, question: Reply(
        text=f"Better: {words[int(question.split('prompt ')[-1].split()[0]) % 3]}"
    )
    with opened(http(server), location) as pool:
        answers = asyncio.run(pool.compare([item(i) for i in range(12)], "label"))
        assert [(a.preference, a.first_id, a.second_id) for a in answers] == [
            (words[i % 3], f"p{i}-a", f"p{i}-b") for i in range(12)
        ]
    assert sorted(kept(location, Comparison), key=lambda a: int(a.prompt_id[1:])) == answers
    assert kept(location, Judgement) == []


def test_each_order_is_paid_once_within_and_across_calls(server, location):
    with opened(http(server), location) as pool:

        async def callers():
            return await asyncio.gather(
                pool.compare([item(1), turned(1), item(1)], "label"),
                pool.compare([turned(1), item(1)], "label"),
                pool.compare([replace(item(1), second_id="elsewhere")], "evaluate"),
            )

        same, _, elsewhere = asyncio.run(callers())
        assert counts(pool) == {"spent": 2, "scored": 2}
    assert server.num_asked == 2
    assert [a.first_id for a in same] == ["p1-a", "p1-b", "p1-a"]
    assert (elsewhere[0].second_id, elsewhere[0].purpose, elsewhere[0].preference) == ("elsewhere", "evaluate", "first")
    with opened(http(server), location) as pool:
        asyncio.run(pool.compare([item(1), turned(1)], "label"))
    assert server.num_asked == 2


def test_64_concurrent_callers_never_exceed_the_budget(server, location):
    server.plan = lambda index, question: Reply(text="neither" if index % 3 else "Better: tie")
    with opened(http(server, max_concurrency=16), location, label=50) as pool:

        async def callers():
            calls = [
                pool.compare([order(i) for i in range(n, n + 3) for order in (item, turned)], "label")
                for n in range(64)
            ]
            return await asyncio.gather(*calls)

        results = asyncio.run(callers())
        assert counts(pool)["spent"] == server.num_asked == 50
    assert max(Counter(server.questions).values()) == 1 and server.max_active <= 16
    refused = [answer for result in results for answer in result if answer.rationale == BUDGET_EXHAUSTED]
    assert refused and {(a.status, a.preference, a.cost_usd) for a in refused} == {("abstained", None, 0.0)}


def test_judgements_and_comparisons_draw_on_one_budget(server, location):
    server.plan = lambda index, question: Reply(text="Score: 3" if "Score: n" in question else "Better: first")
    judged = Judgement(prompt_id="p1", response_id="p1-a", prompt="prompt 1", response="a 1")
    with opened(http(server), location, label=2) as pool:

        async def three():
            await pool.judge([judged], "label")
            return await pool.compare([item(1), item(2)], "label")

        answers = asyncio.run(three())
        assert [a.preference for a in answers].count("first") == 1 and server.num_asked == 2
    assert len(kept(location, Judgement)) == len(kept(location, Comparison)) == 1


def test_failures_never_become_preferences(server, location):
    bad = [Reply(text="the first?"), Reply(status=500), Reply(drop=True), Reply(body="{}"), Reply(text="Score: 3")]
    server.plan = lambda index, question: bad[int(question.split("prompt ")[-1].split()[0]) % len(bad)]
    with opened(http(server, max_unreadable=100), location) as pool:
        answers = asyncio.run(pool.compare([item(i) for i in range(10)], "label"))
        assert counts(pool) == {"spent": 8, "abstained": 8, "refunded": 4}  # those without an answer, asked twice
    assert all(a.status == "abstained" and a.preference is None and a.rationale for a in answers)


def test_an_oracle_that_cannot_compare_costs_nothing(location):
    config = ScriptedOracleConfig(function="tests.oracles.length_oracle:judge")
    with opened(config, location) as pool:
        (answer,) = asyncio.run(pool.compare([item(1)], "label"))
        assert (answer.preference, counts(pool)) == (None, {"refunded": 1})


def test_usd_are_held_for_both_responses(server, location):
    prices = {"usd_per_1m_input": 1000.0, "usd_per_1m_output": 1000.0, "max_tokens": 20}
    server.plan = lambda index, question: Reply(text="Better: tie", usage=(len(question) // 4, 20))
    with opened(http(server, budget_usd=10.0, **prices), location) as pool:
        answers = asyncio.run(pool.compare([item(i) for i in range(60)], "evaluate"))
        spent = pool.summary()["evaluate"].cost_usd
    assert [a.status for a in answers].count("scored") == server.num_asked < 60
    assert sum(a.cost_usd for a in answers) == pytest.approx(spent) and 0 < spent <= 10.0
    with sqlite3.connect(location) as db:
        assert db.execute("SELECT count(*) FROM attempts WHERE second IS NULL").fetchone() == (0,)
