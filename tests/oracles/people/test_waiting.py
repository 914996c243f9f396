"""People's answers end in the ledger once, the run waits until there is enough, and judges' doubts go to people."""

import asyncio
import contextlib
import sqlite3
from dataclasses import asdict
from datetime import UTC, datetime, timedelta

import pytest

from rayrl.config import PanelOracleConfig, RubricConfig, SheetOracleConfig
from rayrl.errors import JudgeFailed, UsdExhausted, WaitingForPeople
from rayrl.models.judge_prompt import load_rubric
from rayrl.oracles.pool import OraclePool
from rayrl.records import Comparison, Judgement
from tests.oracles.people.test_sheet import fill, rows_of

RUBRIC = load_rubric(RubricConfig())
LATER = datetime.now(UTC) + timedelta(days=300)
EARLIER = datetime.now(UTC) - timedelta(days=1)


def items(num):
    return [
        Judgement(prompt_id=f"p{n}", response_id=f"p{n}-0", prompt=f"prompt {n}", response="x" * (n + 1))
        for n in range(num)
    ]


def pairs(num):
    return [
        Comparison(prompt_id=f"p{n}", first_id="a", second_id="b", prompt=f"prompt {n}", first="x", second=f"y {n}")
        for n in range(num)
    ]


def sheet(tmp_path, **settings):
    return SheetOracleConfig(path=str(tmp_path / "questions.csv"), **settings)


@contextlib.contextmanager
def opened(tmp_path, config, **budgets):
    budgets = {"label": 100, "evaluate": 100, "people": 100} | budgets
    pool = OraclePool(config, RUBRIC, str(tmp_path / "ledger.sqlite"), budgets, "run")
    try:
        yield pool
    finally:
        pool.close()


def judge(pool, questions):
    return asyncio.run(pool.judge(questions, "label", "query"))


def scores(answers):
    return [answer.score for answer in answers]


def table(tmp_path, name):
    with contextlib.closing(sqlite3.connect(tmp_path / "ledger.sqlite")) as db:
        return list(db.execute(f"SELECT * FROM {name}"))


def test_a_run_parks_until_all_is_answered_and_asks_nothing_twice(tmp_path):
    path = tmp_path / "questions.csv"
    with opened(tmp_path, sheet(tmp_path)) as pool:
        with pytest.raises(WaitingForPeople, match=r"0 of 3 questions of query are answered, and 3 are needed\n.*csv"):
            judge(pool, items(3))
        waiting = pool.waiting()
        assert (waiting.num_answered, waiting.num_needed, len(waiting.keys)) == (0, 3, 3)
    fill(path, "score", [4, None, None])
    with opened(tmp_path, sheet(tmp_path)) as pool, pytest.raises(WaitingForPeople, match=r"1 of 3 .* 3 are needed"):
        judge(pool, items(3))
    assert len(rows_of(path)) == 4
    fill(path, "score", [4, "cannot say", 2])
    fill(path, "reasons", ["good", "unknown to me"])
    with opened(tmp_path, sheet(tmp_path)) as pool:
        answers = judge(pool, items(3))
        assert scores(answers) == [4.0, None, 2.0]
        assert [answer.status for answer in answers] == ["scored", "abstained", "scored"]
        assert answers[1].rationale == "cannot say: unknown to me"
        assert pool.summary()["label"].spent == 3
        assert pool.waiting() is None
    # What is in the ledger needs no file any more.
    path.unlink()
    with opened(tmp_path, sheet(tmp_path)) as pool:
        assert scores(judge(pool, items(3))) == [4.0, None, 2.0]
        assert pool.summary()["label"].spent == 3
    assert len(table(tmp_path, "attempts")) == 3


def test_nothing_is_in_the_ledger_before_it_is_answered(tmp_path):
    with opened(tmp_path, sheet(tmp_path)) as pool, pytest.raises(WaitingForPeople):
        judge(pool, items(3))
    assert table(tmp_path, "attempts") == []
    with opened(tmp_path, sheet(tmp_path)) as pool:  # and so none is lost when the owner is killed
        assert pool.summary()["label"].lost == 0


def test_several_people_are_combined_and_each_is_kept(tmp_path):
    config = sheet(tmp_path, people=["anna", "ben"], num_people=2, usd_per_answer=0.5)
    with opened(tmp_path, config) as pool, pytest.raises(WaitingForPeople, match="each by 2 people"):
        judge(pool, items(2))
    fill(tmp_path / "questions-anna.csv", "score", [1, 3])
    fill(tmp_path / "questions-ben.csv", "score", [2])
    with opened(tmp_path, config) as pool, pytest.raises(WaitingForPeople, match="1 of 2 questions"):
        judge(pool, items(2))
    fill(tmp_path / "questions-ben.csv", "score", [2, "cannot say"])
    with opened(tmp_path, config) as pool:
        answers = judge(pool, items(2))
        assert sorted(scores(answers)) == [1.5, 3.0]
        assert pool.summary()["label"].cost_usd == 2.0
    kept = {(annotator, score) for _, annotator, score, _, _ in table(tmp_path, "annotations")}
    assert kept == {("anna", 1.0), ("anna", 3.0), ("ben", 2.0), ("ben", None)}


def test_enough_ends_the_waiting_with_what_there_is(tmp_path):
    config = sheet(tmp_path, enough=0.5)
    with opened(tmp_path, config) as pool, pytest.raises(WaitingForPeople, match=r"0 of 5 .* and 3 are needed"):
        judge(pool, items(5))
    fill(tmp_path / "questions.csv", "score", [5, 5, None, 5])
    with opened(tmp_path, config) as pool:
        answers = judge(pool, items(5))
        assert sorted(score for score in scores(answers) if score is not None) == [5.0] * 3
        assert {answer.rationale for answer in answers if answer.score is None} == {"not answered by people"}
        assert pool.summary()["label"].spent == 3


def test_a_deadline_ends_the_waiting_also_with_fewer_people(tmp_path):
    waits, over = ({"people": ["anna", "ben"], "num_people": 2, "deadline": when} for when in (LATER, EARLIER))
    with opened(tmp_path, sheet(tmp_path, **waits)) as pool, pytest.raises(WaitingForPeople):
        judge(pool, items(2))
    with (
        opened(tmp_path, sheet(tmp_path, **over)) as pool,
        pytest.raises(JudgeFailed, match=r"none of 2 questions of query is answered, and oracle.deadline is over"),
    ):
        judge(pool, items(2))
    fill(tmp_path / "questions-anna.csv", "score", [1])
    with opened(tmp_path, sheet(tmp_path, **over)) as pool:
        assert sorted(scores(judge(pool, items(2))), key=str) == [1.0, None]


def test_budgets_bound_what_is_put_before_people(tmp_path):
    with opened(tmp_path, sheet(tmp_path), label=2) as pool, pytest.raises(WaitingForPeople, match="0 of 2 questions"):
        judge(pool, items(5))
    assert len(rows_of(tmp_path / "questions.csv")) == 3
    fill(tmp_path / "questions.csv", "score", [1, 1])
    with opened(tmp_path, sheet(tmp_path), label=2) as pool:
        assert scores(judge(pool, items(5))) == [1.0, 1.0, None, None, None]
    other = tmp_path / "other"
    other.mkdir()
    priced = sheet(other, usd_per_answer=1.0, budget_usd=1.5)
    with opened(other, priced) as pool:
        with pytest.raises(UsdExhausted, match="it pays for 1 of 2 more questions"):
            judge(pool, items(2))
        assert not (other / "questions.csv").exists()  # nobody works for nothing
        with pytest.raises(WaitingForPeople, match="0 of 1 questions"):
            asyncio.run(pool.judge(items(2), "evaluate", "evaluate"))


def test_comparisons(tmp_path):
    with opened(tmp_path, sheet(tmp_path)) as pool, pytest.raises(WaitingForPeople):
        asyncio.run(pool.compare(pairs(2), "label", "preferences"))
    fill(tmp_path / "questions-comparisons.csv", "better", ["second", "tie"])
    with opened(tmp_path, sheet(tmp_path)) as pool:
        answers = asyncio.run(pool.compare(pairs(2), "label", "preferences"))
        assert [answer.preference for answer in answers] == ["second", "tie"]


def half(prompt, response):
    return 2.0 if len(response) % 2 else None


def strict(prompt, response):
    return min(5.0, float(len(response)))


def lenient(prompt, response):
    return 5.0


def people_of(tmp_path, **settings):
    return {"type": "sheet", "path": str(tmp_path / "questions.csv"), **settings}


def panel(tmp_path, first=strict, second=lenient, **settings):
    judges = [{"type": "scripted", "function": f"{each.__module__}:{each.__name__}"} for each in (first, second)]
    settings = {"people_above": 1.0, "people_budget": 10, "people": people_of(tmp_path)} | settings
    return PanelOracleConfig(judges=judges, **settings)


def test_people_settle_what_judges_doubt(tmp_path):
    # The judges say 1 and 5, 2 and 5, 3 and 5, 4 and 5, 5 and 5: deviations 2, 1.5, 1, 0.5, 0.
    config = panel(tmp_path)
    with opened(tmp_path, config) as pool, pytest.raises(WaitingForPeople, match="0 of 3 questions"):
        judge(pool, items(5))
    fill(tmp_path / "questions.csv", "score", [0, 1, "cannot say"])
    with opened(tmp_path, config) as pool:
        answers = judge(pool, items(5))
        assert scores(answers) == [0.0, 1.0, 4.0, 4.5, 5.0]  # judges' where people cannot say
        assert [answer.oracle == "people" for answer in answers] == [True, True, False, False, False]
        spent = {name: counts.spent for name, counts in pool.summary().items()}
        assert spent == {"label": 5, "people": 3, "evaluate": 0}
    with opened(tmp_path, config) as pool:
        assert [asdict(each) for each in judge(pool, items(5))] == [asdict(each) for each in answers]


def test_people_are_asked_first_where_judges_say_nothing_and_no_more_than_their_budget(tmp_path):
    config = panel(tmp_path, first=half, second=half, people_budget=2)
    with opened(tmp_path, config, people=2) as pool, pytest.raises(WaitingForPeople, match="0 of 2 questions"):
        judge(pool, items(5))
    assert [row[1] for row in rows_of(tmp_path / "questions.csv")[1:]] == ["prompt 1", "prompt 3"]


def test_a_panel_that_is_sure_asks_nobody(tmp_path):
    with opened(tmp_path, panel(tmp_path, first=lenient)) as pool:
        assert scores(judge(pool, items(3))) == [5.0] * 3
    assert not (tmp_path / "questions.csv").exists()


def test_a_panel_whose_people_are_spent_goes_on_with_its_judges(tmp_path):
    config = panel(tmp_path, people_budget=1)
    with opened(tmp_path, config, people=1) as pool, pytest.raises(WaitingForPeople, match="0 of 1 questions"):
        judge(pool, items(5))
    fill(tmp_path / "questions.csv", "score", [0])
    with opened(tmp_path, config, people=1) as pool:
        assert scores(judge(pool, items(5))) == [0.0, 3.5, 4.0, 4.5, 5.0]
        other = [Judgement(prompt_id="q", response_id="q-0", prompt="another", response="x")]
        assert scores(asyncio.run(pool.judge(other, "evaluate", "evaluate"))) == [3.0]


def test_a_panel_whose_deadline_is_over_goes_on_with_its_judges(tmp_path):
    with opened(tmp_path, panel(tmp_path, people=people_of(tmp_path, deadline=EARLIER))) as pool:
        assert scores(judge(pool, items(5))) == [3.0, 3.5, 4.0, 4.5, 5.0]


def test_what_judges_were_not_asked_is_not_put_before_people(tmp_path):
    with opened(tmp_path, panel(tmp_path, first=lenient), label=2) as pool:
        assert scores(judge(pool, items(4))) == [5.0, 5.0, None, None]
    assert not (tmp_path / "questions.csv").exists()


def test_a_settled_answer_counts_as_the_judges_question(tmp_path):
    config = panel(tmp_path)
    with opened(tmp_path, config) as pool, pytest.raises(WaitingForPeople):
        judge(pool, items(5))
    fill(tmp_path / "questions.csv", "score", [0, 1, 2])
    with opened(tmp_path, config) as pool:
        answers = judge(pool, items(5))
        assert pool.num_spent([answer.key for answer in answers], "label") == 5


def test_no_more_answers_are_paid_than_a_question_needs(tmp_path):
    both = sheet(tmp_path, people=["anna", "ben"], num_people=2, usd_per_answer=1.0)
    with opened(tmp_path, both) as pool, pytest.raises(WaitingForPeople):
        judge(pool, items(1))
    for name in ("anna", "ben"):
        fill(tmp_path / f"questions-{name}.csv", "score", [3])
    one = sheet(tmp_path, people=["anna", "ben"], usd_per_answer=1.0, budget_usd=1.0)
    assert one.in_key != both.in_key
    with opened(tmp_path, both) as pool:
        judge(pool, items(1))
        assert pool.summary()["label"].cost_usd == 2.0


def test_the_share_that_is_enough_is_not_raised_by_rounding(tmp_path):
    config = sheet(tmp_path, enough=0.55)
    with opened(tmp_path, config) as pool, pytest.raises(WaitingForPeople, match="and 55 are needed"):
        judge(pool, items(100))


def test_judges_answer_in_parts_before_people_are_asked_about_the_whole(tmp_path):
    config = panel(tmp_path)
    with opened(tmp_path, config) as pool:
        parts = [
            asyncio.run(pool.judge(part, "label", "query", by_people=False)) for part in (items(5)[:3], items(5)[3:])
        ]
        assert scores([*parts[0], *parts[1]]) == [3.0, 3.5, 4.0, 4.5, 5.0]
        assert not (tmp_path / "questions.csv").exists()
        with pytest.raises(WaitingForPeople, match="0 of 3 questions"):
            judge(pool, items(5))
        assert pool.summary()["label"].spent == 5
    with opened(tmp_path, sheet(tmp_path)) as pool:
        assert scores(asyncio.run(pool.judge(items(2), "label", "query", by_people=False))) == [None, None]
