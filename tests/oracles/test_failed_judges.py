"""A judge that fails stops the asking; nothing is lost, nothing is paid twice, and a mended judge answers the rest."""

import asyncio
import contextlib
from collections import Counter

import pytest

from rayrl.config import HttpOracleConfig, ScriptedOracleConfig
from rayrl.errors import JudgeFailed
from rayrl.oracles import breaker
from tests.judge_server import Reply
from tests.oracles.test_pool import counts, items, opened, statuses

WAYS = {
    "401": Reply(status=401, text="Incorrect API key"),
    "402": Reply(status=402, text="can only afford 20 tokens"),
    "403": Reply(status=403, text="Forbidden"),
    "404": Reply(status=404, text="The model judge-1 does not exist"),
    "no credit": Reply(
        status=429,
        headers={"retry-after": "0"},
        body='{"error": {"message": "You exceeded your current quota", "code": "insufficient_quota"}}',
    ),
    "html": Reply(headers={"Content-Type": "text/html"}, body="<!doctype html><title>Gateway</title>"),
    "streams": Reply(headers={"Content-Type": "text/event-stream"}, body="data: {}\n\ndata: [DONE]\n\n"),
    "unreadable": Reply(text="I would rather not put a number on it."),
}


@pytest.fixture(autouse=True)
def no_waits(monkeypatch):
    monkeypatch.setattr(breaker, "PROBE_WAITS_S", (0.01, 0.02))


def http(server, **settings):
    defaults = {"base_url": server.url, "model": "judge-1", "api_key_env": None, "max_retries": 1}
    return HttpOracleConfig(**(defaults | settings))


def stops(pool, questions):
    with pytest.raises(JudgeFailed) as stopped:
        asyncio.run(pool.judge(questions, "label", "query"))
    return str(stopped.value)


@pytest.mark.parametrize("way", WAYS)
def test_a_judge_that_dies_and_comes_back_ends_in_the_answers_of_one_that_never_failed(server, location, way):
    num_well, num_at_once = 20, 4
    answered = Counter()

    def answer(question):
        answered[question] += 1
        return Reply()

    server.plan = lambda index, question: answer(question) if index < num_well else WAYS[way]
    with opened(http(server, max_concurrency=num_at_once), location, label=80) as pool:
        message = stops(pool, items(*range(60)))
        first = pool.summary()["label"]
    num_asked = server.num_asked
    assert num_asked - num_well <= num_at_once + 8
    assert (first.scored, first.in_flight) == (num_well, 0)
    assert "run the same command again" in message and "delete" not in message
    server.plan = lambda index, question: answer(question)
    # Another key, another limit: the same judge.
    well = http(server, max_concurrency=2, requests_per_minute=100_000, timeout_s=30.0)
    with opened(well, location, label=80) as pool:
        answers = asyncio.run(pool.judge(items(*range(60)), "label", "query"))
    assert statuses(answers) == ["scored"] * 60
    assert Counter(answered.values()) == {1: 60}  # what was answered is not asked again


@pytest.mark.parametrize(
    ("reply", "reason"),
    [
        (Reply(status=400, text="Stream must be set to true"), "stream"),
        (Reply(body='{"choices": [{"message": {"content": null, "reasoning_content": "..."}}]}'), "thoughts"),
        (Reply(text="Good.\nRating: [[4]]"), "Rating: [[4]]"),
        (Reply(status=404, text="Not Found"), "/v1"),
        (Reply(status=500, text="overloaded"), "overloaded"),
        (Reply(drop=True), "connection lost"),
    ],
)
def test_a_judge_that_never_answers_costs_a_few_calls_and_says_why(server, location, reply, reason):
    server.plan = lambda index, question: reply
    with opened(http(server, max_concurrency=4, max_retries=0), location) as pool:
        message = stops(pool, items(*range(60)))
        assert pool.summary()["label"].scored == 0
    assert server.num_asked <= 4 + 8
    assert reason in message


def test_a_server_that_ignores_max_tokens_stops_the_asking_and_says_by_how_much(server, location):
    server.plan = lambda index, question: Reply(usage=(300, 9000))
    prices = {"usd_per_1m_input": 2.0, "usd_per_1m_output": 8.0, "budget_usd": 0.1}
    with opened(http(server, max_concurrency=2, **prices), location) as pool:
        message = stops(pool, items(*range(60)))
        assert counts(pool.summary())["scored"] == server.num_asked <= 2
    assert "9000" in message.replace(",", "") and "512" in message and "oracle.max_tokens" in message


def test_answers_from_the_ledger_do_not_hide_a_judge_that_nobody_can_read(server, location):
    config = http(server, max_concurrency=1, max_unreadable=3)
    with opened(config, location) as pool:
        asyncio.run(pool.judge(items(*range(0, 40, 2)), "label"))
    server.plan = lambda index, question: WAYS["unreadable"]
    with opened(config, location) as pool:
        stops(pool, items(*range(40)))  # every second one is known
    assert server.num_asked == 20 + 3


def test_one_bad_answer_in_between_stops_nothing(server, location):
    server.plan = lambda index, question: Reply(text="no number") if index % 4 == 0 else Reply()
    with opened(http(server, max_concurrency=1, max_unreadable=2), location) as pool:
        answers = asyncio.run(pool.judge(items(*range(40)), "label"))
    assert Counter(statuses(answers)) == {"scored": 30, "abstained": 10}


def test_a_short_outage_of_the_key_is_waited_out_by_one_call(server, location):
    server.plan = lambda index, question: WAYS["401"] if index == 5 else Reply()
    with opened(http(server, max_concurrency=1), location, label=12) as pool:
        answers = asyncio.run(pool.judge(items(*range(12)), "label"))
        assert counts(pool.summary()) == {"spent": 12, "scored": 12, "refunded": 1}
    assert statuses(answers) == ["scored"] * 12 and server.num_asked == 13


def test_unreadable_answers_at_the_very_end_stop_the_stage_as_well(server, location):
    server.plan = lambda index, question: Reply() if index < 10 else WAYS["unreadable"]
    with opened(http(server, max_concurrency=1, max_unreadable=3), location) as pool:
        message = stops(pool, items(*range(13)))
        assert counts(pool.summary()) == {"spent": 13, "scored": 10, "lost": 3}
    assert "3 answers in a row could not be read (oracle.max_unreadable)" in message


def test_calls_under_way_are_kept_before_the_run_ends(server, location):
    server.plan = lambda index, question: WAYS["401"] if index >= 3 else Reply(drip=True, usage=None)
    with opened(http(server, max_concurrency=4), location) as pool:
        stops(pool, items(*range(20)))
        assert counts(pool.summary())["scored"] == 3
        assert pool.summary()["label"].in_flight == 0


def test_every_later_question_is_refused_with_the_same_reason(server, location):
    server.plan = lambda index, question: WAYS["401"]
    with opened(http(server, max_concurrency=2), location) as pool:
        first = stops(pool, items(1, 2, 3))
        num_asked = server.num_asked
        assert stops(pool, items(4)) == first
    assert server.num_asked == num_asked <= 4


FUNCTIONS = """
import json
calls = []

def broken(prompt, response):
    calls.append(response)
    return helper(response)

def helper(response):
    if response in ("answer 3", "answer 4"):
        raise ImportError("two threads at once")
    return 3

def at_first(prompt, response):
    calls.append(response)
    if calls.count("answer 3") == 1 and response == "answer 3":
        json.loads("{")
    return None if response == "answer 1" else 2

def leaves(prompt, response):
    raise SystemExit("no licence")

def stops(prompt, response):
    return next(iter(()))

async def interrupts(prompt, response):
    raise KeyboardInterrupt

def too_large(prompt, response):
    return 10 ** 400

def half_a_character(prompt, response):
    return 3, "a \\ud800 b"
"""


@pytest.fixture
def functions(tmp_path, monkeypatch):
    name = f"functions_{tmp_path.name}"
    (tmp_path / f"{name}.py").write_text(FUNCTIONS)
    monkeypatch.chdir(tmp_path)
    return name


def test_a_function_that_raises_is_a_failed_judge_with_its_own_traceback(functions, location, tmp_path):
    config = ScriptedOracleConfig(function=f"{functions}:broken", max_concurrency=1)
    with opened(config, location) as pool:
        message = stops(pool, items(*range(6)))
        assert counts(pool.summary())["scored"] == 3
        assert "abstained" not in counts(pool.summary())
    assert "broken('prompt 3', 'answer 3') raised" in message
    assert f'File "{tmp_path / functions}.py", line 11, in helper' in message
    assert "ImportError: two threads at once" in message
    assert "rayrl/oracles" not in message and "concurrent/futures" not in message


def test_a_function_that_raises_once_is_asked_again_and_one_that_returns_none_abstains(functions, location):
    config = ScriptedOracleConfig(function=f"{functions}:at_first", max_concurrency=2)
    with opened(config, location) as pool:
        answers = asyncio.run(pool.judge(items(*range(6)), "label"))
    assert [answer.score for answer in answers] == [2.0, None, 2.0, 2.0, 2.0, 2.0]


@pytest.mark.parametrize(
    ("function", "reason"),
    [("leaves", "SystemExit: no licence"), ("stops", "StopIteration"), ("interrupts", "Keyboard")],
)
def test_what_would_end_the_process_is_a_failed_judge_too(functions, location, function, reason):
    with opened(ScriptedOracleConfig(function=f"{functions}:{function}", timeout_s=20.0), location) as pool:
        message = stops(pool, items(*range(3)))
        assert counts(pool.summary()) == {"refunded": pool.summary()["label"].refunded}
    assert reason in message and "Mend the function" in message


def test_what_no_table_can_hold_is_an_abstention_or_is_replaced(functions, location):
    with opened(ScriptedOracleConfig(function=f"{functions}:too_large"), location) as pool:
        (answer,) = asyncio.run(pool.judge(items(1), "label"))
        assert answer.status == "abstained"
    with opened(ScriptedOracleConfig(function=f"{functions}:half_a_character"), location) as pool:
        (answer,) = asyncio.run(pool.judge(items(1), "label"))
        assert (answer.score, answer.rationale) == (3.0, "a \ufffd b")


def test_a_fault_of_an_oracle_type_stops_the_asking(server, location, monkeypatch):
    with opened(http(server, max_concurrency=2), location) as pool:

        async def broken(prompt, response):
            raise ZeroDivisionError("a fault of ours")

        monkeypatch.setattr(pool._oracle, "judge", broken)
        message = stops(pool, items(*range(20)))
        assert pool.summary()["label"].spent <= 2
    assert "raised ZeroDivisionError: a fault of ours" in message


# The test question.


def tried(pool, questions=None):
    return asyncio.run(pool.try_out(items(1, 2, 3) if questions is None else questions))


def test_the_test_question_is_paid_counted_and_asked_once(server, location):
    config = http(server, usd_per_1m_input=1000.0, usd_per_1m_output=1000.0)
    for _ in range(2):
        with contextlib.closing(_pool_with_tests(config, location)) as pool:
            assert tried(pool) == "score 3, 0.1200 USD"
            assert counts(pool.summary(), "test") == {"spent": 1, "scored": 1, "cost_usd": pytest.approx(0.12)}
    assert server.num_asked == 1


def test_the_next_test_question_is_asked_if_nobody_can_read_the_first(server, location):
    server.plan = lambda index, question: WAYS["unreadable"] if index < 2 else Reply()
    with contextlib.closing(_pool_with_tests(http(server), location)) as pool:
        assert tried(pool) == "score 3, unpriced"
    assert server.num_asked == 3


def test_a_judge_that_nobody_can_read_is_refused_and_tried_again_after_mending(server, location):
    server.plan = lambda index, question: WAYS["unreadable"]
    for _ in range(2):
        with (
            contextlib.closing(_pool_with_tests(http(server), location)) as pool,
            pytest.raises(JudgeFailed, match="none of 3 answers could be read"),
        ):
            tried(pool)
    assert server.num_asked == 6
    server.plan = lambda index, question: Reply()
    with contextlib.closing(_pool_with_tests(http(server), location)) as pool:
        assert tried(pool) == "score 3, unpriced"


def _pool_with_tests(config, location):
    from rayrl.oracles.pool import OraclePool
    from tests.oracles.test_pool import RUBRIC

    return OraclePool(config, RUBRIC, location, {"label": 100, "evaluate": 100, "test": 60})
