"""An oracle type is a config class and an implementation, and nothing else knows the types."""

import ast
import asyncio
import contextlib
from pathlib import Path
from typing import ClassVar, Literal

import pytest

import rayrl.oracles
from rayrl.config import (
    HttpOracleConfig,
    OracleBase,
    PanelOracleConfig,
    ReplayOracleConfig,
    RubricConfig,
    ScriptedOracleConfig,
)
from rayrl.config.oracle import OracleTable, Prices
from rayrl.models.judge_prompt import load_rubric
from rayrl.oracles.build import build_oracle
from rayrl.oracles.http import HttpOracle
from rayrl.oracles.pool import OraclePool
from rayrl.oracles.protocol import Verdict
from rayrl.oracles.questions import BUDGET_EXHAUSTED
from rayrl.oracles.replay import ReplayOracle
from rayrl.oracles.scripted import ScriptedOracle
from rayrl.records import Comparison, Judgement

BUILT_IN = RubricConfig()
RUBRIC = load_rubric(BUILT_IN)
OWN = RubricConfig(template="mine.txt")
BOTH_OWN = RubricConfig(template="mine.txt", pairwise_template="pairs.txt")
HTTP = {"base_url": "http://judge:8000/v1", "model": "judge-1"}


class TossConfig(OracleBase):
    """A made-up type: tosses a loaded coin, at one dollar a million tokens."""

    implementation: ClassVar[str] = f"{__name__}:TossOracle"
    type: Literal["toss"] = "toss"
    heads: float = 4.0
    dollars: float

    def label(self) -> str:
        return f"a coin that shows {self.heads:g}"

    def prices(self) -> Prices:
        return Prices(usd_per_1m_input=1.0, usd_per_1m_output=1.0, max_tokens=1, budget_usd=self.dollars)


class TossOracle:
    """Every toss costs a quarter of a dollar."""

    def __init__(self, config, rubric):
        self._config, self._rubric = config, rubric
        self.name = self.comparer = "toss"

    def check(self):
        assert self._rubric.accepts(self._config.heads)

    def estimate_usd(self, prompt, response, second=None):
        return 0.25

    async def judge(self, prompt, response):
        return Verdict(score=self._config.heads, rationale="heads", cost_usd=0.25)

    async def compare(self, prompt, first, second):
        return Verdict(score=0.5, rationale="on its edge", cost_usd=0.25)


def test_a_made_up_type_is_built_checked_and_paid(tmp_path):
    config = TossConfig(heads=5.0, dollars=1.0)
    oracle = build_oracle(config, RUBRIC)
    oracle.check()
    assert isinstance(oracle, TossOracle) and config.can_compare(BUILT_IN)
    judgements = [Judgement(prompt_id="p", response_id=f"p-{i}", prompt="p", response=str(i)) for i in range(3)]
    pair = Comparison(prompt_id="p", first_id="p-0", second_id="p-1", prompt="p", first="0", second="1")
    pool = OraclePool(config, RUBRIC, str(tmp_path / "ledger.sqlite"), {"label": 10, "evaluate": 10})

    async def ask():
        return await pool.judge(judgements, "label"), await pool.compare([pair, pair.turned()], "evaluate")

    with contextlib.closing(pool):
        judged, compared = asyncio.run(ask())
        counts = pool.summary()
    assert [(j.score, j.oracle, j.purpose, j.cost_usd) for j in judged] == [(5.0, "toss", "label", 0.25)] * 3
    assert (compared[0].preference, compared[0].rationale) == ("tie", "on its edge")
    assert (compared[1].status, compared[1].rationale) == ("abstained", BUDGET_EXHAUSTED)  # after four quarters
    assert (counts["label"].spent, counts["evaluate"].spent) == (3, 1)


def test_no_other_module_distinguishes_the_types():
    package = Path(rayrl.oracles.__file__).parents[1]
    known = {"HttpOracleConfig", "ScriptedOracleConfig", "ReplayOracleConfig"}
    # An endpoint is a part of the HTTP judge.
    of_types = {"oracles/http.py", "oracles/endpoints.py", "oracles/scripted.py", "oracles/replay.py"}
    # What a study compares with beside its oracle is a table, whatever the oracle is.
    of_studies = {"study/config.py", "study/labels.py"}
    allowed = {"config/oracle.py", "config/__init__.py"} | of_types | of_studies
    for path in package.rglob("*.py"):
        name = path.relative_to(package).as_posix()
        used = {node.id for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Name)} & known
        assert not used or name in allowed, f"{name} knows {used}"


def test_each_type_names_its_implementation():
    configs = [
        (HttpOracleConfig(**HTTP, api_key_env=None), HttpOracle),
        (ScriptedOracleConfig(function="tests.oracles.length_oracle:judge"), ScriptedOracle),
    ]
    for config, implementation in configs:
        assert type(build_oracle(config, RUBRIC)) is implementation
    assert ReplayOracleConfig.implementation == f"{ReplayOracle.__module__}:{ReplayOracle.__name__}"


@pytest.mark.parametrize(
    ("config", "rubric", "missing"),
    [
        (HttpOracleConfig(**HTTP), BUILT_IN, ""),
        (HttpOracleConfig(**HTTP), BOTH_OWN, ""),
        (HttpOracleConfig(**HTTP), OWN, "rubric.pairwise_template is missing"),
        (ScriptedOracleConfig(function="m:judge", compare_function="m:compare"), OWN, ""),
        (ScriptedOracleConfig(function="m:judge"), BOTH_OWN, "oracle.compare_function is missing"),
        (ReplayOracleConfig(comparisons_path="pairs.csv"), OWN, ""),
        (ReplayOracleConfig(path="scores.csv"), BUILT_IN, "oracle.comparisons_path is missing"),
    ],
)
def test_what_is_missing_to_compare(config, rubric, missing):
    assert config.missing_to_compare(rubric).startswith(missing)
    assert config.can_compare(rubric) == (missing == "") == (config.missing_to_compare(rubric) == "")


def test_only_a_table_of_comparisons_cannot_judge():
    assert ReplayOracleConfig(comparisons_path="pairs.csv").missing_to_judge().startswith("oracle.path is missing")
    for config in (ReplayOracleConfig(path="a.csv"), HttpOracleConfig(**HTTP), ScriptedOracleConfig(function="m:f")):
        assert config.missing_to_judge() == ""


def test_a_panel_is_free_if_all_its_judges_are_and_flips_if_one_of_them_does():
    exact = ScriptedOracleConfig(function="m:judge", compare_function="m:compare")
    noisy = ScriptedOracleConfig(function="m:judge", compare_function="m:compare", flip_probability=0.25)
    paid = HttpOracleConfig(**HTTP)
    cases = [([exact, noisy], True, True), ([exact, exact], True, False), ([exact, paid], False, False)]
    for judges, is_free, flips in cases:
        panel = PanelOracleConfig(judges=judges)
        assert (panel.is_free(), panel.flips_comparisons()) == (is_free, flips)
    assert ReplayOracleConfig(path="a.csv").is_free() and not paid.is_free()


def test_each_type_lists_its_inputs():
    http = HttpOracleConfig(**HTTP, api_key_env="JUDGE_KEY")
    assert (http.key_source(), http.functions(), http.tables()) == ("JUDGE_KEY", {}, [])
    scripted = ScriptedOracleConfig(function="m:judge", compare_function="m:compare")
    assert scripted.functions() == {"oracle.function": "m:judge", "oracle.compare_function": "m:compare"}
    assert ScriptedOracleConfig(function="m:judge").functions() == {"oracle.function": "m:judge"}
    replay = ReplayOracleConfig(path="a.csv", comparisons_path="b.csv", rationale_column="why")
    assert replay.tables() == [
        OracleTable(
            setting="oracle.path",
            path="a.csv",
            encoding="utf-8",
            holds="judgements",
            columns=["prompt", "response", "score", "why"],
        ),
        OracleTable(
            setting="oracle.comparisons_path",
            path="b.csv",
            encoding="utf-8",
            holds="comparisons",
            columns=["prompt", "first", "second", "preference", "why"],
        ),
    ]
    assert replay.secret_sources() == scripted.secret_sources() == {}


def test_only_given_prices_are_prices():
    assert HttpOracleConfig(**HTTP).prices() is None
    assert ScriptedOracleConfig(function="m:f").prices() is None
    prices = HttpOracleConfig(**HTTP, usd_per_1m_input=2.0, usd_per_1m_output=10.0, budget_usd=3.0).prices()
    assert prices == Prices(usd_per_1m_input=2.0, usd_per_1m_output=10.0, max_tokens=512, budget_usd=3.0)
    assert prices.cost_usd(100, 20) == pytest.approx(100 * 2e-6 + 20 * 10e-6)


@pytest.mark.parametrize(
    ("config", "label", "shown"),
    [
        (HttpOracleConfig(**HTTP), "judge-1 at http://judge:8000/v1", {"oracle model": "judge-1"}),
        (ScriptedOracleConfig(function="m:judge"), "m:judge", {"oracle function": "m:judge"}),
        (ReplayOracleConfig(path="a.csv", comparisons_path="b.csv"), "a.csv, b.csv", {"judgements": "a.csv"}),
        (TossConfig(dollars=1.0), "a coin that shows 4", {}),
    ],
)
def test_each_type_shows_itself_to_humans(config, label, shown):
    assert config.label() == label
    assert shown.items() <= config.shown().items()
