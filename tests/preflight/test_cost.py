"""Price of all paid queries."""

import pytest

from rayrl.models.judge_prompt import ADDITIVE_RUBRIC, ANSWER_FORMAT
from rayrl.models.pairwise_prompt import PAIRWISE_RUBRIC
from rayrl.preflight import check, render_plan
from tests.preflight.trees import EVALUATOR, JUDGE, TWO_CPUS, changed, plan_of, save_rows


def test_prices_give_usd(tree, tmp_path, monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", "secret")
    (tmp_path / "rubric.txt").write_text("<prompt> {prompt} </prompt> <response> {response} </response>")
    oracle = {"type": "http", "base_url": "http://127.0.0.1:9", "model": "m", "api_key_env": "JUDGE_KEY"}
    oracle |= {"usd_per_1m_input": 0.0, "usd_per_1m_output": 1000.0, "max_tokens": 100, "budget_usd": 1.0}
    plan = check(changed(tree, oracle=oracle, rubric__template=str(tmp_path / "rubric.txt")), cluster=TWO_CPUS)
    assert plan.usd == pytest.approx(14 * 0.1)
    assert any("oracle.budget_usd stops them at 1.00" in warning for warning in plan.warnings)
    assert "secret" not in render_plan(plan)


def test_comparisons_are_priced_as_such(rlp_tree, tmp_path):
    """Price per input token only: two prompts of their own lengths, with two responses and one."""
    prices = {"usd_per_1m_input": 1e6, "usd_per_1m_output": 0.0}
    both = plan_of(rlp_tree, oracle=JUDGE | prices).usd
    answers = {"path": save_rows(tmp_path / "answers.jsonl", [{"prompt": "p 1", "response": "a"}])}
    with_references = plan_of(
        rlp_tree, oracle=JUDGE | prices, evaluate={"budget": 12, "reference_answers": answers}
    ).usd
    labels = plan_of(rlp_tree, oracle=JUDGE | prices, evaluate__budget=0).usd
    judged = plan_of(rlp_tree, oracle=JUDGE | prices, evaluate__budget=0, **EVALUATOR).usd

    def words(text):
        return len(text.replace("{prompt}", "").replace("{first}", "").replace("{second}", "").split())

    pointwise = words((ADDITIVE_RUBRIC + ANSWER_FORMAT).replace("{response}", "")) + 2 + 16
    pairwise = words(PAIRWISE_RUBRIC) + 2 + 2 * 16
    assert labels == pytest.approx(10 * pairwise)
    assert with_references == pytest.approx(both + 6 * pairwise)
    assert judged == pytest.approx(10 * pointwise)
    assert both == pytest.approx(labels + 6 * pointwise)
