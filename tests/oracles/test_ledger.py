"""The ledger tries to be overdrawn, killed, corrupted and asked twice, and stays right."""

import asyncio
import contextlib
import os
import signal
import sqlite3
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from types import SimpleNamespace

import fsspec
import pytest

from rayrl.errors import BudgetExhausted, RunDirectoryError
from rayrl.models.judge_prompt import Rubric
from rayrl.oracles.ledger import Ledger, Reserved
from rayrl.oracles.ledger_schema import read_answer
from rayrl.oracles.protocol import Verdict
from rayrl.oracles.questions import address
from rayrl.records import Comparison, Judgement

SCORED = Verdict(score=3.0, rationale="good", cost_usd=0.01, input_tokens=7, output_tokens=2)
ABSTAINED = Verdict(score=None, rationale="unclear", cost_usd=0.02)
UNBILLED = Verdict(score=None, rationale="refused", billed=False)


RUBRIC = Rubric(template="{prompt} {response}", min_score=0, max_score=5, pairwise="{prompt} {first} {second}")
OTHER_RUBRIC = replace(RUBRIC, template="Or else: {prompt} {response}", pairwise="Or else: {prompt} {first} {second}")


def addressed(question, purpose="label", oracle="test", rubric=RUBRIC):
    """As the pool hands it to the ledger."""
    return address(question, SimpleNamespace(name=oracle, comparer=oracle), rubric, purpose)


def judgement(index, response_id=None, prompt=None, response="answer"):
    return Judgement(
        prompt_id=f"p{index}",
        response_id=response_id or f"p{index}-0",
        prompt=prompt or f"prompt {index}",
        response=response,
    )


def query(index, response_id=None, **asked):
    return addressed(judgement(index, response_id), **asked)


@pytest.fixture
def location(tmp_path):
    return str(tmp_path / "run" / "ledger.sqlite")


_OPENED = []


@pytest.fixture(autouse=True)
def close_ledgers():
    """Close what a test leaves open."""
    yield
    while _OPENED:
        _OPENED.pop().close()


def opened(location, label=10, evaluate=10, **settings):
    ledger = Ledger(location, {"label": label, "evaluate": evaluate}, owner_wait_s=0.0, **settings)
    _OPENED.append(ledger)
    return ledger


def pay(ledger, index, verdict=SCORED, purpose="label"):
    claim = ledger.reserve(query(index, purpose=purpose))
    assert isinstance(claim, Reserved)
    return ledger.commit(claim, verdict)


def counts(ledger, purpose="label"):
    left_out = ("budget", "input_tokens", "output_tokens", "abstentions")
    return {name: value for name, value in asdict(ledger.summary()[purpose]).items() if value and name not in left_out}


def answers(location, record=Judgement, purpose="label"):
    """Read the paid answers of one kind from a ledger's file, in the order in which they were asked."""
    id_column = "response_id" if record is Judgement else "second_id"
    with contextlib.closing(sqlite3.connect(location)) as db:
        db.row_factory = sqlite3.Row
        paid = f"purpose = ? AND state IN ('scored', 'abstained') AND {id_column} IS NOT NULL"
        rows = db.execute(f"SELECT * FROM attempts WHERE {paid}", (purpose,)).fetchall()
    return [read_answer(row, record) for row in rows]


def test_a_judgement_says_who_judged_what_and_for_how_much(location):
    paid = pay(opened(location), 1)
    assert paid == Judgement(
        key=query(1).key,
        prompt_id="p1",
        response_id="p1-0",
        prompt="prompt 1",
        response="answer",
        oracle="test",
        status="scored",
        score=3.0,
        rationale="good",
        purpose="label",
        cost_usd=0.01,
    )


def test_budget_is_spent_to_the_last_and_no_further(location):
    ledger = opened(location, label=3)
    for index in range(3):
        pay(ledger, index)
    with pytest.raises(BudgetExhausted, match="all 3"):
        ledger.reserve(query(3))
    pay(ledger, 3, purpose="evaluate")  # a budget of its own
    assert counts(ledger) == {"spent": 3, "scored": 3, "cost_usd": pytest.approx(0.03)}


def test_what_some_questions_took_of_a_budget(location):
    ledger = opened(location)
    for index, verdict in enumerate([SCORED, ABSTAINED, UNBILLED, SCORED]):
        pay(ledger, index, verdict)
    pay(ledger, 5, purpose="evaluate")
    ledger.lose(ledger.reserve(query(6)).attempt)
    pay(ledger, 6)  # the answer, after a call that was lost
    keys = [query(index).key for index in range(9)]
    assert ledger.num_spent(keys, "label") == counts(ledger)["spent"] == 5
    assert ledger.num_spent([keys[0], keys[0], keys[2], keys[5]], "label") == 1
    assert ledger.num_spent([keys[6]], "label") == 2
    assert ledger.num_spent([], "label") == 0


def test_a_purpose_without_a_budget_has_none(location):
    with pytest.raises(BudgetExhausted):
        opened(location).reserve(query(0, purpose="curiosity"))


def test_reservations_count_before_they_are_paid(location):
    ledger = opened(location, label=2)
    claims = [ledger.reserve(query(index)) for index in range(2)]
    with pytest.raises(BudgetExhausted):
        ledger.reserve(query(2))
    assert counts(ledger) == {"in_flight": 2}
    ledger.commit(claims[0], UNBILLED)
    assert isinstance(ledger.reserve(query(2)), Reserved)


def test_paid_once_is_free_ever_after_under_any_purpose(location):
    ledger = opened(location, label=1, evaluate=0)
    paid = pay(ledger, 1)
    again = ledger.reserve(query(1))
    other = ledger.reserve(query(1, "q-7", purpose="evaluate"))
    assert again == paid
    assert isinstance(other, Judgement) and (other.score, other.cost_usd) == (3.0, 0.0)
    assert (other.response_id, other.purpose) == ("q-7", "evaluate")
    assert counts(ledger, "evaluate") == {}


@pytest.mark.parametrize("field", ["prompt", "response", "oracle", "rubric"])
def test_another_question_is_another_payment(location, field):
    ledger = opened(location)
    pay(ledger, 1)
    other = {
        "prompt": addressed(judgement(1, prompt="other")),
        "response": addressed(judgement(1, response="other")),
        "oracle": query(1, oracle="other"),
        "rubric": query(1, rubric=OTHER_RUBRIC),
    }
    assert isinstance(ledger.reserve(other[field]), Reserved)


def test_a_paid_abstention_is_final_and_an_unbilled_one_is_refunded(location):
    ledger = opened(location, label=2)
    final, refunded = pay(ledger, 1, ABSTAINED), pay(ledger, 2, UNBILLED)
    assert (final.status, final.score, final.cost_usd) == ("abstained", None, 0.02)
    assert (refunded.status, refunded.rationale, refunded.cost_usd) == ("abstained", "refused", 0.0)
    assert ledger.reserve(query(1)) == final
    assert pay(ledger, 2).score == 3.0
    assert counts(ledger) == {
        "spent": 2, "scored": 1, "abstained": 1, "refunded": 1, "cost_usd": pytest.approx(0.03)
    }  # fmt: skip


def test_judgements_are_what_was_paid_for_in_order(location):
    ledger = opened(location)
    paid = [pay(ledger, 5), pay(ledger, 1, ABSTAINED), pay(ledger, 3)]
    pay(ledger, 2, UNBILLED)
    pay(ledger, 9, purpose="evaluate")
    ledger.flush()
    assert answers(location, Judgement) == paid


def test_reopening_keeps_everything(location):
    ledger = opened(location, label=2)
    paid = [pay(ledger, 1), pay(ledger, 2, ABSTAINED)]
    before = ledger.summary()
    ledger.close()
    ledger = opened(location, label=2)
    assert answers(location, Judgement) == paid and ledger.summary() == before
    with pytest.raises(BudgetExhausted):
        ledger.reserve(query(3))


def test_what_was_under_way_is_lost_counted_and_may_be_asked_anew(location):
    ledger = opened(location, label=2, budget_usd=1.0)
    ledger.reserve(query(1), 0.4)
    ledger.close()
    ledger = opened(location, label=2, budget_usd=1.0)
    assert counts(ledger) == {"spent": 1, "lost": 1, "cost_usd": 0.4}
    claim = ledger.reserve(query(1), 0.4)
    assert ledger.commit(claim, SCORED).score == 3.0
    assert counts(ledger) == {"spent": 2, "lost": 1, "scored": 1, "cost_usd": pytest.approx(0.41)}
    with pytest.raises(BudgetExhausted):
        ledger.reserve(query(2))


def test_a_call_of_unknown_outcome_counts_and_may_be_asked_anew(location):
    ledger = opened(location, label=2)
    ledger.lose(ledger.reserve(query(1)).attempt)
    assert pay(ledger, 1).score == 3.0
    assert counts(ledger) == {"spent": 2, "lost": 1, "scored": 1, "cost_usd": 0.01}


def test_usd_are_held_at_the_estimate_and_spent_at_the_price(location):
    ledger = opened(location, budget_usd=1.0)
    claim = ledger.reserve(query(1), 0.6)
    with pytest.raises(BudgetExhausted, match=r"budget_usd .*0\.6000 of 1\.0000"):
        ledger.reserve(query(2), 0.6)
    ledger.commit(claim, SCORED)
    second = ledger.reserve(query(2, purpose="evaluate"), 0.6)  # the limit is over all purposes
    with pytest.raises(BudgetExhausted):
        ledger.reserve(query(3), 0.6)
    ledger.commit(second, UNBILLED)
    assert isinstance(ledger.reserve(query(3), 0.6), Reserved)


def test_usd_survive_a_restart(location):
    ledger = opened(location, budget_usd=1.0)
    ledger.commit(ledger.reserve(query(1), 0.9), Verdict(score=1.0, rationale="", cost_usd=0.9))
    ledger.close()
    with pytest.raises(BudgetExhausted):
        opened(location, budget_usd=1.0).reserve(query(2), 0.2)


@pytest.mark.parametrize("budget_usd", [None, 0.25])
def test_64_threads_never_overspend(location, budget_usd):
    ledger = opened(location, label=40, budget_usd=budget_usd)

    def spend(index):
        try:
            claim = ledger.reserve(query(index), 0.01)
        except BudgetExhausted:
            return 0
        ledger.commit(claim, SCORED)
        return 1

    with ThreadPoolExecutor(64) as threads:
        num_paid = sum(threads.map(spend, range(300)))
    expected = 40 if budget_usd is None else 25
    assert num_paid == counts(ledger)["scored"] == expected
    ledger.flush()
    with sqlite3.connect(location) as db:
        assert db.execute("SELECT count(*) FROM attempts").fetchone() == (expected,)


PREFERRED = Verdict(score=0.0, rationale="the second", cost_usd=0.01)


def comparison(index, first="a", second="b", prompt=None):
    return Comparison(
        prompt_id=f"p{index}",
        first_id=f"p{index}-{first}",
        second_id=f"p{index}-{second}",
        prompt=prompt or f"prompt {index}",
        first=first,
        second=second,
    )


def pair(index, first="a", second="b", **asked):
    return addressed(comparison(index, first, second), **asked)


def test_a_comparison_says_who_preferred_what_and_for_how_much(location):
    ledger = opened(location)
    paid = ledger.commit(ledger.reserve(pair(1)), PREFERRED)
    assert paid == Comparison(
        key=pair(1).key,
        prompt_id="p1",
        first_id="p1-a",
        second_id="p1-b",
        prompt="prompt 1",
        first="a",
        second="b",
        oracle="test",
        status="scored",
        preference="second",
        rationale="the second",
        purpose="label",
        cost_usd=0.01,
    )
    assert ledger.reserve(pair(1)) == paid
    ledger.flush()
    with sqlite3.connect(location) as db:
        asked = db.execute("SELECT first, second, preference, response, score FROM attempts").fetchall()
    assert asked == [("a", "b", "second", None, None)]


def test_the_other_order_is_another_payment(location):
    ledger = opened(location, label=2)
    ledger.commit(ledger.reserve(pair(1)), PREFERRED)
    turned = ledger.reserve(addressed(comparison(1).turned()))
    assert isinstance(turned, Reserved)
    assert ledger.commit(turned, Verdict(score=1.0, rationale="the second again")).preference == "first"
    with pytest.raises(BudgetExhausted):
        ledger.reserve(pair(2))


@pytest.mark.parametrize("field", ["prompt", "first", "second", "oracle", "rubric"])
def test_another_comparison_is_another_payment(location, field):
    ledger = opened(location)
    ledger.commit(ledger.reserve(pair(1)), PREFERRED)
    other = {
        "prompt": addressed(comparison(1, prompt="other")),
        "first": pair(1, first="other"),
        "second": pair(1, second="other"),
        "oracle": pair(1, oracle="other"),
        "rubric": pair(1, rubric=OTHER_RUBRIC),
    }
    assert isinstance(ledger.reserve(other[field]), Reserved)


def test_judgements_and_comparisons_share_a_budget_and_never_mix(location):
    ledger = opened(location, label=3)
    judged = pay(ledger, 1)
    compared = ledger.commit(ledger.reserve(pair(1)), PREFERRED)
    abstained = ledger.commit(ledger.reserve(pair(2)), ABSTAINED)
    assert (abstained.status, abstained.preference) == ("abstained", None)
    with pytest.raises(BudgetExhausted):
        ledger.reserve(pair(3))
    ledger.close()
    ledger = opened(location, label=3)
    assert answers(location, Judgement) == [judged]
    assert answers(location, Comparison) == [compared, abstained]
    assert counts(ledger) == {"spent": 3, "scored": 2, "abstained": 1, "cost_usd": pytest.approx(0.04)}


def test_a_shared_comparison_costs_once(location):
    ledger = opened(location, label=1)
    ledger.commit(ledger.reserve(pair(1)), PREFERRED)
    other = ledger.reserve(replace(pair(1, purpose="evaluate"), second_id="q-7"))
    assert isinstance(other, Comparison)
    assert (other.second_id, other.preference, other.purpose, other.cost_usd) == ("q-7", "second", "evaluate", 0.0)


KILLED = """
import os, signal, sys
from rayrl.oracles.ledger import Ledger
from rayrl.oracles.protocol import Verdict
from rayrl.records import Judgement
ledger = Ledger(sys.argv[1], {"label": 10})
for index, key in enumerate(sys.argv[2:]):
    question = Judgement(key=key, prompt_id=f"p{index}", response_id=f"p{index}-0", prompt=f"prompt {index}",
                         response="answer", oracle="test", purpose="label")
    claim = ledger.reserve(question)
    if index < 4:
        ledger.commit(claim, Verdict(score=3.0, rationale="good", cost_usd=0.01))
ledger.flush()
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_kill_9_loses_no_paid_judgement_and_no_count(location):
    keys = [query(index).key for index in range(7)]
    killed = subprocess.run([sys.executable, "-c", KILLED, location, *keys], check=False, cwd=os.getcwd())
    assert killed.returncode == -signal.SIGKILL
    ledger = opened(location)
    assert counts(ledger) == {"spent": 7, "scored": 4, "lost": 3, "cost_usd": pytest.approx(0.04)}
    assert all(isinstance(ledger.reserve(query(index)), Judgement) for index in range(4))


def test_what_is_written_together_waits_for_the_disk_together_and_before_the_call(location, monkeypatch):
    ledger = opened(location, label=100)
    waits = []
    sync_log = ledger._sync_log
    monkeypatch.setattr(ledger, "_sync_log", lambda: (waits.append(1), sync_log()))

    async def ask(index):
        claim = ledger.reserve(query(index))
        await ledger.sync()
        with contextlib.closing(sqlite3.connect(location)) as db:  # as it would be found after a kill
            found = db.execute("SELECT state FROM attempts WHERE attempt = ?", (claim.attempt,)).fetchone()
        ledger.commit(claim, SCORED)
        await ledger.keep()
        return found

    async def ask_all():
        return await asyncio.gather(*(ask(index) for index in range(50)))

    assert set(asyncio.run(ask_all())) == {("reserved",)}
    assert len(waits) <= 3
    assert len(answers(location)) == 50  # and the answers are with the operating system


def test_a_refused_reservation_leaves_the_others_as_they_are(location):
    ledger = opened(location, label=1)
    claim = ledger.reserve(query(1))
    with pytest.raises(BudgetExhausted):
        ledger.reserve(query(2))
    ledger.commit(claim, SCORED)
    ledger.close()
    assert [answer.prompt_id for answer in answers(location)] == ["p1"]


def test_a_ledger_has_one_owner(location):
    ledger = opened(location)
    with pytest.raises(RunDirectoryError, match="another process"):
        opened(location)
    ledger.close()
    opened(location)


def test_a_file_that_is_no_ledger_is_refused(tmp_path):
    path = tmp_path / "ledger.sqlite"
    path.write_bytes(b"something else entirely" * 100)
    with pytest.raises(RunDirectoryError, match="not a usable ledger"):
        opened(str(path))


@pytest.mark.parametrize(
    "change", ["PRAGMA user_version = 9", "ALTER TABLE attempts RENAME COLUMN preference TO verdict"]
)
def test_a_ledger_of_another_version_is_refused_before_anything_is_paid(tmp_path, change):
    path = str(tmp_path / "ledger.sqlite")
    opened(path).close()
    with contextlib.closing(sqlite3.connect(path)) as db:
        db.execute(change)
    with pytest.raises(RunDirectoryError, match="open it with the rayrl that wrote it"):
        opened(path)


VERSION_0 = """
CREATE TABLE attempts (
    attempt INTEGER PRIMARY KEY AUTOINCREMENT, key TEXT NOT NULL, purpose TEXT NOT NULL, state TEXT NOT NULL,
    oracle TEXT NOT NULL, prompt_id TEXT NOT NULL, prompt TEXT NOT NULL, response_id TEXT, response TEXT, score REAL,
    first_id TEXT, second_id TEXT, first TEXT, second TEXT, preference TEXT, rationale TEXT NOT NULL DEFAULT '',
    cost_usd REAL NOT NULL, input_tokens INTEGER NOT NULL DEFAULT 0, output_tokens INTEGER NOT NULL DEFAULT 0,
    reserved_at TEXT NOT NULL DEFAULT CURRENT_TIMESTAMP);
CREATE UNIQUE INDEX one_answer ON attempts (key) WHERE state IN ('reserved', 'scored', 'abstained');
"""


def test_what_an_older_version_paid_for_is_not_paid_again(tmp_path):
    path = str(tmp_path / "ledger.sqlite")
    with contextlib.closing(sqlite3.connect(path)) as db:
        db.executescript(VERSION_0)
        for index, (state, score, usd) in enumerate([("scored", 3.0, 0.5), ("reserved", None, 0.2)]):
            db.execute(
                "INSERT INTO attempts (key, purpose, state, oracle, prompt_id, prompt, response_id, response, score,"
                " cost_usd) VALUES (?, 'label', ?, 'test', 'p', 'prompt', 'r', 'answer', ?, ?)",
                (query(index).key, state, score, usd),
            )
        db.commit()
    ledger = opened(path, label=2, run="a run")
    assert ledger.reserve(query(0)).score == 3.0
    assert counts(ledger) == {"spent": 2, "scored": 1, "lost": 1, "cost_usd": pytest.approx(0.7)}
    with pytest.raises(BudgetExhausted):
        ledger.reserve(query(5))


def test_runs_that_share_a_ledger_pay_once_and_each_from_its_own_budget(location):
    first = opened(location, label=2, run="first")
    paid = [pay(first, 1), pay(first, 2)]
    first.close()
    second = opened(location, label=2, evaluate=5, run="second")
    assert [second.reserve(query(index), stage="query").score for index in (1, 2)] == [3.0, 3.0]
    assert second.reserve(query(1, purpose="evaluate"), stage="evaluate").score == 3.0
    pay(second, 3)
    pay(second, 4)
    with pytest.raises(BudgetExhausted, match="all 2"):
        second.reserve(query(5))
    assert counts(second) == {"spent": 2, "scored": 2, "taken_over": 2, "cost_usd": pytest.approx(0.02)}
    assert counts(second, "evaluate") == {"taken_over": 1}
    second.close()
    again = opened(location, label=3, run="first")
    assert [again.reserve(query(index)) for index in (1, 2)] == paid
    assert counts(again) == {"spent": 2, "scored": 2, "cost_usd": pytest.approx(0.02)}
    assert isinstance(again.reserve(query(6)), Reserved)


def test_answers_of_a_failed_judge_stay_counted_and_are_asked_again(location):
    ledger = opened(location, label=4)
    claims = [ledger.reserve(query(index)) for index in range(3)]
    for claim, verdict in zip(claims, (SCORED, ABSTAINED, UNBILLED), strict=True):
        ledger.commit(claim, verdict)
    ledger.lose(*(claim.attempt for claim in claims[1:]))
    assert counts(ledger) == {"spent": 2, "scored": 1, "lost": 1, "refunded": 1, "cost_usd": pytest.approx(0.03)}
    assert pay(ledger, 1).score == pay(ledger, 2).score == 3.0


def test_no_price_is_none_and_never_zero(location):
    ledger = opened(location)
    answer = pay(ledger, 1, Verdict(score=3.0, rationale="", input_tokens=70, output_tokens=20))
    assert answer.cost_usd is None
    summary = ledger.summary()["label"]
    assert (summary.cost_usd, summary.input_tokens, summary.output_tokens) == (None, 70, 20)
    assert summary.price() == "unpriced, 70 tokens read and 20 written"


def test_why_questions_abstained_is_counted(location):
    ledger = opened(location)
    for index, reason in enumerate(["unclear", "refused", "unclear"]):
        pay(ledger, index, replace(ABSTAINED, rationale=reason))
    assert ledger.summary()["label"].abstentions == {"unclear": 2, "refused": 1}


def test_a_closed_ledger_is_one_file(location):
    ledger = opened(location)
    pay(ledger, 1)
    folder = os.path.dirname(location)
    assert "ledger.sqlite-wal" in os.listdir(folder)
    ledger.close()
    assert sorted(os.listdir(folder)) == ["ledger.sqlite", "ledger.sqlite.lock"]
    assert len(answers(location)) == 1


def test_a_comparison_without_a_valid_preference_abstains_and_stays_paid(tmp_path):
    ledger = opened(str(tmp_path / "ledger.sqlite"))
    reserved = ledger.reserve(pair(1))
    answer = ledger.commit(reserved, Verdict(score=0.7, rationale="", cost_usd=0.5))
    assert (answer.status, answer.preference, answer.cost_usd) == ("abstained", None, 0.5)
    assert "must be one of [0.0, 0.5, 1.0], got 0.7" in answer.rationale
    assert ledger.summary()["label"].spent == 1


@pytest.fixture(params=["memory", "file"])
def url(request, tmp_path):
    if request.param == "file":
        return f"file://{tmp_path}/far/away/ledger.sqlite"
    return f"memory://{tmp_path.name}/ledger.sqlite"


def test_a_remote_ledger_is_taken_up_elsewhere_as_of_the_last_sync(url):
    first = opened(url)
    pay(first, 1)
    first.reserve(query(2))
    asyncio.run(first.sync())
    pay(first, 3)  # never synced: this machine dies here
    second = opened(url)
    assert counts(second) == {"spent": 2, "scored": 1, "lost": 1, "cost_usd": 0.01}
    filesystem, path = fsspec.url_to_fs(url)
    assert not filesystem.exists(f"{path}.part")


def test_a_sync_covers_every_write_before_it(url):
    ledger = opened(url, label=50)

    async def one(index):
        claim = ledger.reserve(query(index))
        await ledger.sync()
        other = opened(url, label=50)
        is_there = isinstance(other.reserve(query(index + 100)), Reserved) and counts(other)["lost"] > 0
        ledger.commit(claim, SCORED)
        await ledger.sync()
        return is_there

    async def many():
        return await asyncio.gather(*(one(index) for index in range(20)))

    assert all(asyncio.run(many()))
    assert counts(opened(url, label=50))["scored"] == 20


def test_what_an_older_version_paid_for_is_the_runs_whose_ledger_it_is(tmp_path):
    path = str(tmp_path / "ledger.sqlite")
    with contextlib.closing(sqlite3.connect(path)) as db:
        db.executescript(VERSION_0)
        db.execute(
            "INSERT INTO attempts (key, purpose, state, oracle, prompt_id, prompt, response_id, response, score,"
            " cost_usd) VALUES (?, 'label', 'scored', 'test', 'p', 'prompt', 'r', 'answer', 3.0, 0.5)",
            (query(0).key,),
        )
        db.commit()
    other = opened(path, label=1, run="another run", is_own=False)  # oracle.ledger names this file
    assert other.reserve(query(0)).score == 3.0
    assert counts(other) == {"taken_over": 1}
    assert isinstance(other.reserve(query(1)), Reserved)
    other.close()
    own = opened(path, label=1, run="the run")
    assert counts(own)["spent"] == 1
    with pytest.raises(BudgetExhausted):
        own.reserve(query(2))


def test_nothing_is_asked_once_the_ledger_could_not_be_written(location):
    ledger = opened(location)
    ledger.reserve(query(1))
    ledger._db.execute("PRAGMA max_page_count = 1")  # as a full disk
    ledger._db.execute("PRAGMA cache_size = 1")

    async def ask(index):
        ledger.reserve(replace(query(index), prompt="x" * 100_000))
        await ledger.sync()

    async def ask_all():
        return await asyncio.gather(*(ask(index) for index in range(2, 8)), return_exceptions=True)

    outcomes = asyncio.run(ask_all())
    assert all(isinstance(outcome, RunDirectoryError) for outcome in outcomes)
    assert "make room on its disk, and run the same command again" in str(outcomes[0])
    with pytest.raises(RunDirectoryError, match="could not be written"):
        ledger.flush()


def test_the_outlook_of_questions_tells_what_is_paid_and_what_a_changed_judge_prompt_asks_anew(location):
    with contextlib.closing(opened(location, label=5)) as ledger:
        pay(ledger, 1)
        pay(ledger, 2)
        same = ledger.outlook([query(1), query(2), query(3), query(3)], "label", "query")
        assert (same.num_known, same.num_new, same.num_earlier, same.num_reworded) == (2, 1, 0, 0)
        assert (same.num_left, same.num_lost) == (3, 0)
        reworded = ledger.outlook([query(n, rubric=OTHER_RUBRIC) for n in (1, 2, 3)], "label", "query")
        assert (reworded.num_known, reworded.num_new, reworded.num_earlier, reworded.num_reworded) == (0, 3, 2, 2)
        others = ledger.outlook([query(n) for n in (2, 7, 8)], "label", "query")
        assert (others.num_known, others.num_new, others.num_earlier, others.num_reworded) == (1, 2, 1, 0)
        lost = ledger.reserve(query(9))
        assert isinstance(lost, Reserved)
        ledger.lose(lost.attempt)
        assert ledger.outlook([query(9)], "label", "query").num_lost == 1
