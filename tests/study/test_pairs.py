"""Studies of labels whose strategies ask for comparisons."""

import asyncio
import sqlite3
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest

from rayrl.algorithms.selection import STRATEGIES
from rayrl.config import ReplayOracleConfig, RubricConfig
from rayrl.errors import BudgetExhausted, ConfigError, DataError
from rayrl.models.judge_prompt import load_rubric
from rayrl.oracles.questions import BUDGET_EXHAUSTED
from rayrl.oracles.replay import ReplayOracle
from rayrl.study.comparison import Comparison
from rayrl.study.comparisons_table import pool_of_comparisons, table_of
from rayrl.study.config import load_study, run_config
from rayrl.study.label_cells import Job, measure_cell
from rayrl.study.label_study import plan_labels, run_labels
from rayrl.study.labels import Labels
from rayrl.study.page import render_page
from rayrl.study.pool import SCHEMA, STRIDE, StudyPool, pool_counts, study_pool
from rayrl.study.results import Cell
from tests.study.made_up import PAIR_STUDY, replay_comparisons, write_comparisons, write_pool, write_rows, write_study

NUM_PROMPTS, K = 30, 4


@pytest.fixture(scope="module")
def pool():
    rng = np.random.default_rng(1)
    return StudyPool(
        key="p",
        ids=np.array([i * STRIDE + j for i in range(NUM_PROMPTS) for j in range(K)]),
        vectors=rng.standard_normal((NUM_PROMPTS * K, 5)).astype(np.float32),
        lengths=rng.integers(10, 200, NUM_PROMPTS * K),
        prompt_ids=tuple(f"p{i}" for i in range(NUM_PROMPTS)),
    )


def job(arm, budget=12, **changes):
    settings = {"held_out": 0.3, "split_seed": 0, "num_batches": 2, "num_heads": 4, "evaluator": "head"}
    settings |= {"oracle": "o", "pool": "p", "asks": "pairs", "has_scores": False, "first": None}
    return Job(cell=Cell(arm=arm, budget=budget, seed=0), **(settings | changes))


def asked_of(pool, *, answer=lambda gap: float(gap > 0)):
    """An oracle that compares by a linear score, and all that it was asked, one list of pairs per call."""
    scores = pool.vectors @ np.array([1.0, 0.5, 0, 0, 0])
    asked = []

    def ask(questions, *, held_out=False):
        asked.append((questions.tolist(), held_out))
        rows = np.searchsorted(pool.ids, questions)
        if questions.shape[1] == 1:
            return scores[rows[:, 0]].tolist()
        return [answer(scores[first] - scores[second]) for first, second in rows]

    return ask, asked


def measured(job, pool, ask):
    return {each.measure: each for each in measure_cell(job, pool, ask)}


@pytest.mark.parametrize(
    "arm",
    [name for name, strategy in STRATEGIES.items() if strategy.asks == "pairs"],
)
def test_every_strategy_of_pairs_learns_from_prompts_that_are_not_held_out(pool, arm):
    ask, asked = asked_of(pool)
    found = measured(job(arm, 18, first="random_pairs"), pool, ask)
    held_out = set(pool.ids[pool.held_out(0.3, 0)].tolist())
    *chosen, compared = asked
    pairs = [pair for questions, is_held_out in chosen for pair in questions if not is_held_out]
    assert len(pairs) == 18 and not held_out & {identifier for pair in pairs for identifier in pair}
    assert all(first // STRIDE == second // STRIDE for first, second in pairs)
    assert compared[1] and {identifier for pair in compared[0] for identifier in pair} == held_out
    assert found["labels"].mean == 18 and found["agreement"].mean > 0.5 and found["agreement"].num == 9
    assert "pair_accuracy" not in found


def test_everything_is_near_the_truth_nothing_is_chance_and_length_is_taken_out(pool):
    def found(arm, **changes):
        return {name: each.mean for name, each in measured(job(arm, 0, **changes), pool, asked_of(pool)[0]).items()}

    everything = found("everything", has_scores=True)
    assert everything["agreement"] > 0.8 and everything["pair_accuracy"] > 0.8
    assert everything["labels"] == 21 * 2  # disjoint pairs of 21 prompts
    assert found("no labels")["agreement"] == 0.5
    assert found("length alone")["agreement_without_length"] == 0.5


def test_ties_are_answers_that_teach_nothing_and_abstentions_are_counted(pool):
    ask, _ = asked_of(pool, answer=lambda gap: None if abs(gap) < 0.5 else 0.5 if abs(gap) < 1 else float(gap > 0))
    found = {name: each.mean for name, each in measured(job("random_pairs", 20), pool, ask).items()}
    assert found["labels"] + found["abstained"] == 20 and found["ties"] > 0 and found["abstained"] > 0
    with pytest.raises(DataError, match="none of 20 labels was answered: the oracle abstained from or tied all"):
        measured(job("random_pairs", 20), pool, asked_of(pool, answer=lambda gap: 0.5)[0])


def test_questions_of_everything_are_disjoint_pairs_and_the_same_for_every_split(pool):
    everything = pool.questions(np.arange(len(pool.ids)), "pairs")
    assert len(everything) == NUM_PROMPTS * K // 2 == len({tuple(pair) for pair in everything.tolist()})
    assert len(np.unique(everything)) == len(pool.ids)
    some = pool.questions(np.flatnonzero(pool.held_out(0.3, 5)), "pairs")
    assert {tuple(pair) for pair in some.tolist()} <= {tuple(pair) for pair in everything.tolist()}


def test_questions_are_counted():
    sizes = {"a": [3], "b": [4], "c": [2, 2]}
    counts = pool_counts(sizes, [{"b"}, {"c"}], "pairs")
    assert (counts.num_responses, counts.num_questions, counts.num_possible) == (11, 1 + 2 + 2, 3 + 6 + 2)
    assert (counts.num_choosable, counts.num_held_out) == (min(1 + 2, 1 + 1), 2)
    scored = pool_counts(sizes, [{"b"}], "responses")
    assert (scored.num_questions, scored.num_possible, scored.num_choosable, scored.num_held_out) == (11, 11, 7, 4)


class Remote:
    def __init__(self, answer):
        self.remote = answer


class ComparingOracle:
    """Prefers the longer response; counts what it is asked. Of "exhausted" it says that the budget is."""

    def __init__(self):
        self.asked = []
        self.compare = Remote(self._compare)

    async def _compare(self, questions, purpose, stage):
        self.asked += [(question.first, question.second, purpose, stage) for question in questions]
        return [self._answered(question) for question in questions]

    def _answered(self, question):
        if question.prompt == "exhausted":
            return replace(question, status="abstained", rationale=BUDGET_EXHAUSTED)
        gap = len(question.first) - len(question.second)
        preference = "tie" if gap == 0 else "first" if gap > 0 else "second"
        return replace(question, status="scored", preference=preference)


def responses(*, prompt="p"):
    texts = ["a", "bbb", "cc", "dd"]
    return pa.table(
        {
            "id": list(range(4)),
            "prompt_id": ["p"] * 4,
            "response_id": [f"r{i}" for i in range(4)],
            "prompt": [prompt] * 4,
            "response": texts,
        }
    )


@pytest.mark.parametrize("order", ["random", "both"])
def test_a_pair_is_asked_about_once_in_whatever_order_cells_ask(order):
    oracle = ComparingOracle()
    labels = Labels(oracle, responses(), order, None)
    assert asyncio.run(labels.ask([(0, 1), (2, 3), (2, 1)])) == [0.0, 0.5, 0.0]
    assert asyncio.run(labels.ask([(1, 0), (3, 2), (1, 2), (0, 1)])) == [1.0, 0.5, 1.0, 0.0]
    assert len(oracle.asked) == 3 * (2 if order == "both" else 1)
    assert {(purpose, stage) for *_, purpose, stage in oracle.asked} == {("label", "preferences")}


def test_a_study_without_budget_left_ends(tmp_path):
    labels = Labels(ComparingOracle(), responses(prompt="exhausted"), "random", None)
    with pytest.raises(BudgetExhausted, match="max_queries must cover all labels"):
        asyncio.run(labels.ask([(0, 1)]))


def test_held_out_answers_are_the_truths(tmp_path):
    rows = [{"prompt": "p", "first": "bbb", "second": "a", "preference": "second"}]
    write_rows(tmp_path / "truth.jsonl", rows)
    write_rows(tmp_path / "scores.jsonl", [{"prompt": "p", "response": "a", "score": 3.5}])
    config = ReplayOracleConfig(path=str(tmp_path / "scores.jsonl"), comparisons_path=str(tmp_path / "truth.jsonl"))
    oracle = ComparingOracle()
    labels = Labels(oracle, responses(), "random", ReplayOracle(config, load_rubric(RubricConfig())))
    assert asyncio.run(labels.ask([(0, 1), (1, 0), (2, 3)], True)) == [1.0, 0.0, None]
    assert asyncio.run(labels.ask([(0,), (1,)], True)) == [3.5, None]
    assert oracle.asked == []


@pytest.fixture
def folder(tmp_path):
    write_pool(tmp_path)
    write_comparisons(tmp_path)
    return tmp_path


def study_of(folder, *overrides, scores=False):
    return load_study(write_study(folder, oracle=replay_comparisons(folder, scores=scores)), [*PAIR_STUDY, *overrides])


def test_a_table_of_comparisons_is_a_pool_of_its_pairs(folder):
    rows = [{"prompt": "p", "first": "b", "second": "a", "preference": "first"}]
    rows += [{"prompt": "p", "first": "c", "second": "a", "preference": "tie"}]
    rows += [{"prompt": "q", "first": "a", "second": "b", "preference": "neither"}]
    write_rows(folder / "comparisons.jsonl", rows)
    table = table_of(run_config(load_study(write_study(folder, oracle=replay_comparisons(folder)))))
    texts = [("p", "a"), ("p", "b"), ("p", "c"), ("q", "a"), ("q", "b")]
    pool = pa.Table.from_pylist(
        [
            {"id": i, "prompt_id": p, "response_id": f"{p}{r}", "prompt": p, "response": r, "vector": [float(i)]}
            for i, (p, r) in enumerate(texts)
        ],
        schema=SCHEMA,
    )
    compared = pool_of_comparisons(pool, table)
    assert compared["response"].to_pylist() == ["a", "b", "a", "c"]
    made = study_pool("", compared)
    assert made.prompts.tolist() == [0] * 4 and made.sizes() == {"p": [2, 2]}
    assert made.is_repeat.tolist() == [False, False, True, False]
    with pytest.raises(DataError, match="must hold two comparisons or more of the responses in the pool, got 0"):
        pool_of_comparisons(pool.slice(3), table)


def test_a_study_of_pairs_is_run_cached_and_pays_for_each_pair_once(folder, ray_cluster):
    study = study_of(folder, 'measures=["agreement","pair_accuracy","regret"]', scores=True)
    plan = plan_labels(study)
    # Two pairs of each of 40 prompts, and scores of the held-out responses that the table has.
    assert (plan.counts.num_questions, plan.num_queries) == (80, 80 + 160)
    outcomes = run_labels(plan, None)
    assert [outcome.failure for outcome in outcomes if outcome.failure] == []
    with sqlite3.connect(folder / "study" / "ledger.sqlite") as ledger:
        states = dict(ledger.execute("select stage, count(*) from attempts group by stage").fetchall())
    assert states == {"preferences": 80, "query": 160}
    comparison = Comparison(study, outcomes)
    everything = comparison.mean_of(comparison.control_cells("everything", ()), "agreement")
    assert everything is not None and everything.mean > 0.8
    page = render_page(comparison)
    assert "comparisons decided as the oracle does" in page.lower() and "delta_ucb" in page
    again = run_labels(plan_labels(study), None)
    assert all(outcome.seconds == 0 for outcome in again)


def test_measures_without_results_are_not_on_the_page(folder, ray_cluster):
    study = study_of(
        folder,
        "budgets=[10,20]",
        f"truth.comparisons_path='{folder}/comparisons.jsonl'",
        "truth.preference_column=others",
        "ceiling=false",
    )
    plan = plan_labels(study)
    # The truth costs nothing: at most what cells choose.
    assert plan.num_queries == 80
    outcomes = run_labels(plan, None)
    assert not any(outcome.failure for outcome in outcomes)
    assert max(each.num for outcome in outcomes for each in outcome.measured if each.measure == "agreement") < 12
    page = render_page(Comparison(study, outcomes))
    assert "agreement" in study.measured and "Regret of best of n" not in page


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (('measures=["regret"]',), "measures must be of comparisons where no table has scores"),
        (("truth.path='{folder}/judgements.jsonl'",), r"truth\.comparisons_path is missing"),
        (("set.oracle.comparisons_path=nowhere.jsonl",), r"comparisons_path.*nowhere\.jsonl"),
        (("evaluator=scalar",), "strategies must ask for scores"),
        (("baseline=random",), "baseline must be one of"),
        (("budgets=[57]",), r"budgets must be at most the number of pairs .* 56 .*, got 57"),
    ],
)
def test_a_study_of_pairs_that_cannot_end_well_is_refused(folder, overrides, message):
    with pytest.raises((ConfigError, DataError), match=message):
        plan_labels(study_of(folder, *(each.format(folder=folder) for each in overrides)))


def test_an_oracle_that_compares_nothing_is_refused(folder):
    study = load_study(write_study(folder), list(PAIR_STUDY))
    with pytest.raises(ConfigError, match=r"oracle\.comparisons_path is missing.*strategies of this study ask for"):
        plan_labels(study)
