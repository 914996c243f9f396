"""Several judges: each is asked, what they say is combined, and how far they differ is kept in the ledger."""

import asyncio
import contextlib
import sqlite3

import pytest
from pydantic import ValidationError

from rayrl.config import PanelOracleConfig, RubricConfig, RunConfig
from rayrl.errors import ConfigError, JudgeFailed
from rayrl.models.judge_prompt import load_rubric
from rayrl.oracles import breaker
from rayrl.oracles.panel import PanelOracle
from rayrl.oracles.pool import OraclePool
from rayrl.oracles.samples import most_frequent
from tests.judge_server import JudgeServer, Reply
from tests.oracles.test_comparing_pool import item
from tests.oracles.test_pool import items

RUBRIC = load_rubric(RubricConfig())


@contextlib.contextmanager
def judges(*plans):
    with contextlib.ExitStack() as servers:
        yield [servers.enter_context(JudgeServer(lambda index, question, plan=plan: plan(index))) for plan in plans]


def says(*texts):
    return lambda index: Reply(text=texts[index % len(texts)])


def panel(servers, *, prices=None, **settings):
    members = [
        {"type": "http", "base_url": server.url, "model": f"judge-{place}", "max_retries": 0} | (prices or {})
        for place, server in enumerate(servers)
    ]
    return PanelOracleConfig.model_validate({"judges": members, "max_concurrency": 1} | settings)


def ask(config, location, questions, **budgets):
    with contextlib.closing(OraclePool(config, RUBRIC, location, {"label": 100} | budgets)) as pool:
        method = pool.judge if hasattr(questions[0], "response") else pool.compare
        return asyncio.run(method(questions, "label", "query")), pool.summary()["label"]


def test_the_mean_of_the_judges_is_one_query_and_their_disagreement_is_kept(location):
    with judges(says("Score: 2"), says("Score: 3"), says("Score: 4")) as servers:
        config = panel(servers, prices={"usd_per_1m_input": 1000.0, "usd_per_1m_output": 1000.0})
        (answer,), summary = ask(config, location, items(1))
        assert [server.num_asked for server in servers] == [1, 1, 1]
    assert (answer.score, answer.oracle) == (3.0, "panel: http:judge-0, http:judge-1, http:judge-2")
    assert (summary.spent, summary.cost_usd) == (1, pytest.approx(3 * 0.12))
    with contextlib.closing(sqlite3.connect(location)) as db:
        assert db.execute("SELECT disagreement FROM attempts").fetchone()[0] == pytest.approx((2 / 3) ** 0.5)


@pytest.mark.parametrize(
    ("scores", "score"), [([4.0, 4.0, 1.0], 4.0), ([0.0, 2.0, 5.0], 2.0), ([1.0, 4.0], 2.5), ([3.0], 3.0)]
)
def test_the_score_of_more_than_half_of_the_judges_or_their_median(scores, score):
    assert most_frequent(scores) == score


def test_comparisons_are_decided_by_the_majority_or_tie(location):
    first, second = says("Better: first"), says("Better: second")
    with judges(first, first, second) as servers:
        (answer,), _ = ask(panel(servers), location, [item(1)])
        assert answer.preference == "first"
    with judges(first, second) as servers:
        (answer,), _ = ask(panel(servers), location, [item(1)])
        assert answer.preference == "tie"


def test_a_judge_that_abstains_on_an_item_leaves_it_to_the_others(location):
    with judges(says("I cannot say."), says("Score: 5"), says("Score: 3")) as servers:
        (answer,), _ = ask(panel(servers), location, items(1))
        assert answer.score == 4.0
    with judges(says("I cannot say."), says("Hm."), says("Score: 3")) as servers:
        (answer,), _ = ask(panel(servers), location, items(2))
        assert (answer.status, answer.score) == ("abstained", None)
        assert "1 of 3 judges have a score" in answer.rationale


def test_a_judge_that_fails_stops_the_panel_and_the_item_is_asked_again(location, monkeypatch):
    monkeypatch.setattr(breaker, "PROBE_WAITS_S", ())
    with judges(says("Score: 2"), lambda index: Reply(status=401) if index > 1 else Reply()) as servers:
        config = panel(servers)
        with pytest.raises(JudgeFailed, match="401"):
            ask(config, location, items(1, 2, 3, 4))
        servers[1].plan = lambda index, question: Reply()
        answers, summary = ask(config, location, items(1, 2, 3, 4))
    assert [answer.score for answer in answers] == [2.5] * 4
    assert (summary.scored, summary.lost) == (4, 1)  # the first judge was paid for the item that the second refused
    assert servers[0].num_asked == 5


@pytest.mark.parametrize("reply", [Reply(text="I cannot say."), Reply(status=500, text="I cannot say.")])
def test_a_judge_that_nobody_can_read_is_not_hidden_by_the_others(location, reply):
    with judges(says("Score: 2"), lambda index: reply, says("Score: 4")) as servers:
        config = panel(servers, max_unreadable=3)
        with pytest.raises(JudgeFailed, match=r"oracle\.judges\[1\] \(judge-1 at .*3 answers in a row.*I cannot say"):
            ask(config, location, items(*range(20)))
        assert servers[0].num_asked == 3
        servers[1].plan = lambda index, question: Reply()
        answers, _ = ask(config, location, items(*range(2, 20)))  # the third is asked again
    assert [answer.score for answer in answers] == [3.0] * 18


def test_answers_in_between_that_nobody_can_read_stop_no_panel(location):
    with judges(says("Score: 2"), says("Hm.", "Hm.", "Score: 4")) as servers:
        answers, _ = ask(panel(servers, max_unreadable=3), location, items(*range(12)))
    assert [answer.score for answer in answers] == [2.0, 2.0, 3.0] * 4


@pytest.mark.parametrize(
    ("status", "setting"), [(401, "api_key_env"), (402, None), (404, "base_url"), (200, "max_tokens")]
)
def test_messages_name_the_settings_of_the_judge(location, status, setting):
    usage = {"prompt_tokens": 100, "completion_tokens": 9000}
    with judges(says("Score: 2"), lambda index: Reply(status=status, text="Score: 3", usage=usage)) as servers:
        oracle = PanelOracle(panel(servers), RUBRIC)
        failure = asyncio.run(oracle.judge("p", "r")).failure
    assert "oracle.judges[1].base_url http://" in failure and "oracle.base_url" not in failure
    assert setting is None or f"oracle.judges[1].{setting}" in failure


def test_an_abstention_names_the_setting_of_the_judge_and_an_address_stays_as_it_is(location, monkeypatch):
    with judges(says("Score: 2"), lambda index: Reply(text="", finish="length")) as servers:
        oracle = PanelOracle(panel([servers[1], servers[1]]), RUBRIC)
        assert "oracle.judges[1].max_tokens = 512" in asyncio.run(oracle.judge("p", "r")).rationale
    http = {"type": "http", "model": "a", "base_url": "http://oracle.model:9/v1"}
    config = PanelOracleConfig.model_validate({"judges": [http, http | {"api_key_env": "NOT_SET"}]})
    with pytest.raises(ConfigError, match=r"^oracle\.judges\[1\]\.api_key_env"):
        PanelOracle(config, RUBRIC)
    monkeypatch.setenv("NOT_SET", "sk-0123456789")
    with pytest.raises(ConfigError, match=r"oracle\.judges\[0\]\.base_url http://oracle\.model:9/v1"):
        PanelOracle(config, RUBRIC).check()


@pytest.mark.parametrize(
    ("panels", "second", "message"),
    [
        ({"requests_per_minute": 5}, {}, r"requests_per_minute = 5 has no effect on a panel.*judges\[0\]\."),
        ({"tokens_per_minute": 5}, {}, "tokens_per_minute = 5 has no effect"),
        ({"timeout_s": 5.0}, {}, "timeout_s = 5.0 has no effect"),
        ({"max_retries": 0}, {}, "max_retries = 0 has no effect"),
        ({}, {"ledger": "x"}, r"judges\[1\]\.ledger = 'x' has no effect.*set oracle\.ledger"),
        ({}, {"max_unreadable": 2}, r"judges\[1\]\.max_unreadable = 2 has no effect"),
    ],
)
def test_settings_without_an_effect_are_refused(panels, second, message):
    http = {"type": "http", "base_url": "http://a/v1", "model": "a"}
    with pytest.raises(ValidationError, match=message):
        PanelOracleConfig.model_validate({"judges": [http, http | second]} | panels)


def test_a_scripted_judge_keeps_the_number_of_its_threads_and_defaults_may_be_written():
    http = {"type": "http", "base_url": "http://a/v1", "model": "a"}
    scripted = {"type": "scripted", "function": "a:b", "max_concurrency": 1}
    config = PanelOracleConfig.model_validate({"judges": [http, scripted], "max_concurrency": 64})
    assert config.judges[1].max_concurrency == 1
    assert PanelOracleConfig.model_validate_json(config.model_dump_json()) == config


def test_the_limits_of_the_judges_are_operation_and_their_models_are_science():
    def config(**second):
        judge = {"type": "http", "base_url": "http://a/v1", "model": "a"}
        return PanelOracleConfig.model_validate({"judges": [judge, judge | {"model": "b"} | second]})

    plain = config()
    assert config(timeout_s=7.0, base_url="http://b/v1", usd_per_1m_input=1.0, usd_per_1m_output=2.0).science() == (
        plain.science()
    )
    assert config(model="c").science() != plain.science()
    assert plain.operation()["judges[1].timeout_s"] == 120.0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"judges": [{"type": "scripted", "function": "a:b"}]}, "judges must be two or more"),
        ({"budget_usd": 1.0}, "needs the prices of every judge, and judges\\[1\\]"),
    ],
)
def test_what_makes_no_panel_is_refused(changes, message):
    http = {"type": "http", "base_url": "http://a/v1", "model": "a", "usd_per_1m_input": 1.0, "usd_per_1m_output": 2.0}
    with pytest.raises(ValidationError, match=message):
        PanelOracleConfig.model_validate({"judges": [http, {"type": "scripted", "function": "a:b"}]} | changes)


def test_a_budget_of_one_judge_is_refused_and_the_prices_are_added_up():
    http = {"type": "http", "base_url": "http://a/v1", "model": "a", "usd_per_1m_input": 1.0, "usd_per_1m_output": 2.0}
    with pytest.raises(ValidationError, match="for all of them together"):
        PanelOracleConfig.model_validate({"judges": [http, http | {"budget_usd": 1.0}]})
    short = http | {"max_tokens": 100, "usd_per_1m_output": 8.0}
    prices = PanelOracleConfig.model_validate(
        {"judges": [http | {"max_tokens": 400}, short], "budget_usd": 9.0}
    ).prices()
    assert prices.budget_usd == 9.0
    assert prices.bound_usd(1000) == pytest.approx((2 * 1000 * 1.0 + 400 * 2.0 + 100 * 8.0) / 1e6)


def test_a_panel_is_an_oracle_of_a_run(tmp_path):
    (tmp_path / "table.jsonl").write_text("")
    tree = {
        "name": "t",
        "run_dir": str(tmp_path),
        "policy": {"path": "model"},
        "pool": {"path": "pool.jsonl"},
        "sft": {"enabled": False},
        "select": {"budget": 8},
        "oracle": {
            "type": "panel",
            "judges": [{"type": "scripted", "function": "a:b"}, {"type": "replay", "path": "t"}],
        },
    }
    oracle = RunConfig.model_validate(tree).oracle
    assert oracle.functions() == {"oracle.judges[0].function": "a:b"}
    assert [table.setting for table in oracle.tables()] == ["oracle.judges[1].path"]
    assert oracle.missing_to_compare(RubricConfig()).startswith("oracle.judges[0]: oracle.compare_function is missing")
