"""Responses, queries and pairs of a run, and the budgets that are refused."""

from rayrl.errors import ConfigError
from rayrl.preflight import check, render_plan
from tests.preflight.trees import (
    EVALUATOR,
    FUNCTION,
    PAIRS,
    TWO_CPUS,
    changed,
    names,
    pairs_of,
    plan_of,
    refusal,
    save_rows,
)


def test_the_plan_counts_what_will_be_done_and_paid(tree):
    plan = check(changed(tree), cluster=TWO_CPUS)
    assert (plan.num_prompts, plan.num_eval_prompts, plan.num_responses) == (10, 2, 40)
    assert (plan.num_label_queries, plan.num_eval_queries, plan.num_pairs, plan.pairs_per_query) == (
        10,
        4,
        10,
        1.0,
    )
    assert [stage.name for stage in plan.stages] == (
        ["pool", "generate", "select", "query", "fit_evaluator", "pseudo_label", "dpo", "evaluate"]
    )
    assert (plan.mode, plan.reference, plan.usd) == ("overlap", "generation", None)
    text = render_plan(plan)
    assert "10 label queries and 4 evaluation queries" in text
    assert "warning: 1.0 pairs per paid query, and 9 is the aim: add prompts (90 give 9)" in text


def test_the_plan_shows_rounds_and_what_each_asks(tree):
    plan = check(changed(tree, rounds=3), cluster=TWO_CPUS)
    assert plan.label_queries == (4, 3, 3) and plan.num_label_queries == 10
    assert (plan.num_responses, plan.num_pairs, plan.num_eval_queries) == (120, 30, 4)
    text = render_plan(plan)
    assert "rounds   3, with 4 + 3 + 3 label queries; each has generate, select, query, fit_evaluator, " in text
    assert "dpo; each after the first has candidates too\n" in text
    assert "\nrounds" not in render_plan(check(changed(tree), cluster=TWO_CPUS))
    whole = check(changed(tree, rounds=2, select__unit="prompt", select__budget=21), cluster=TWO_CPUS)
    assert whole.label_queries == (8, 12)


def test_a_round_cannot_ask_about_more_than_it_samples(tree):
    assert check(changed(tree, rounds=2, select__budget=80), cluster=TWO_CPUS).label_queries == (40, 40)
    message = refusal(ConfigError, changed(tree, rounds=2, select__budget=81))
    assert "at most the 80 responses (10 prompts x generate.k = 4 x rounds = 2), got 81" in message


def test_rounds_of_the_second_pipeline_judge_every_policy(tree, tmp_path):
    pairs = [{"prompt": p, "chosen": "good", "rejected": "bad"} for p in "pq"]
    oracle = {"type": "scripted", "function": "json:dumps", "compare_function": "json:loads"}
    rlp = tree | {"pipeline": "rlp", "rounds": 2, "oracle": oracle, "evaluate": {"budget": 100}}
    rlp |= {"generate": {"k": 2, "max_tokens": 16}, "refresh": {"n": 3, "spg": {"clustering": "embedding"}}}
    asked = check(changed(rlp, preferences={"source": "oracle"}), cluster={"CPU": 4.0})
    assert (asked.label_queries, asked.num_pairs) == ((4, 6), 5)
    assert (asked.num_eval_queries, asked.num_responses) == (5 * 2, 10 * (3 + 2) * 2)
    data = {"data": {"path": save_rows(tmp_path / "pairs.jsonl", pairs)}}
    given = check(changed(rlp, preferences=data), cluster={"CPU": 4.0})
    assert (given.label_queries, given.num_pairs, given.num_eval_queries) == ((), 2, 4 * 2)
    rounds = "2, with no label queries; each has samples, synthesize, refit_reward_model, ppo_refreshed"
    assert f"\nrounds   {rounds}\n" in render_plan(given)
    proxy = check(changed(rlp, ppo__reward="evaluator"), cluster={"CPU": 4.0})
    assert (proxy.label_queries, proxy.num_eval_queries) == ((5, 5), 3 * 2)


def test_controls_change_what_is_paid(tree):
    expert = check(changed(tree, labels="expert"), cluster=TWO_CPUS)
    assert (expert.num_label_queries, expert.mode) == (40, "alternate")
    assert any("pays for all 40 responses" in warning for warning in expert.warnings)
    direct = check(changed(tree, labels="direct", select__unit="prompt"), cluster=TWO_CPUS)
    assert (direct.num_label_queries, direct.num_pairs) == (8, 2)
    assert "fit_evaluator" not in [stage.name for stage in direct.stages]


def test_budgets_the_pool_cannot_fill_are_refused(tree, tmp_path):
    message = refusal(ConfigError, changed(tree, select__budget=41))
    assert "select.budget must be at most the 40 responses (10 prompts x generate.k = 4), got 41" in message
    check(changed(tree, select__budget=40), cluster=TWO_CPUS)
    message = refusal(ConfigError, changed(tree, pool__num_eval=12))
    assert "pool.num_eval must be below the number of prompts in the pool, 12, got 12" in message
    seed = {"path": save_rows(tmp_path / "s.jsonl", [{"prompt": f"{i}", "response": "b"} for i in range(5)])}
    message = refusal(ConfigError, changed(tree, seed_data=seed, generate__source="seed"))
    assert "select.budget must be at most the 5 responses of the seed data, got 10" in message


def test_the_plan_counts_what_will_be_compared_and_sampled(rlp_tree):
    plan = plan_of(rlp_tree)
    assert (plan.num_prompts, plan.num_label_queries, plan.num_pairs) == (10, 10, 5)
    assert plan.num_responses == 10 * 4 + 10 * 3
    assert plan.num_eval_queries == 6  # M1, pi and pi^ on two prompts
    assert names(plan) == [
        "pool",
        "generate",
        "select",
        "preferences",
        "fit_reward_model",
        "ppo",
        "samples",
        "synthesize",
        "refit_reward_model",
        "ppo_refreshed",
        "evaluate",
    ]
    text = render_plan(plan)
    assert "10 prompts, 70 responses besides PPO's own, and 2 prompts held out" in text
    assert "5 to learn from" in text and "replicas stay up beside every training" in text
    assert "scoring streams" not in text and "per paid query" not in text and "reference log" not in text


def test_a_sampled_part_of_the_pool_is_counted_in_whole_blocks(rlp_tree):
    assert plan_of(rlp_tree, refresh__num_prompts=5).num_responses == 10 * 4 + 8 * 3
    assert plan_of(rlp_tree, refresh__num_prompts=500).num_responses == 10 * 4 + 10 * 3
    assert plan_of(rlp_tree, refresh__method="none").num_responses == 10 * 4


def test_a_file_of_pairs_is_not_paid_for(rlp_tree, tmp_path):
    plan = plan_of(rlp_tree, preferences=pairs_of(tmp_path, PAIRS))
    assert (plan.num_label_queries, plan.num_pairs, plan.num_responses) == (0, 3, 30)
    assert "generate" not in names(plan)


def test_ppo_on_a_function_pays_for_no_labels_whatever_the_other_tables_say(rlp_tree):
    plan = plan_of(rlp_tree, **FUNCTION | {"preferences": {"source": "oracle"}}, evaluate__diagnosis_budget=36)
    assert (plan.num_label_queries, plan.num_pairs, plan.num_responses, plan.num_eval_queries) == (0, 0, 0, 4)
    assert names(plan) == ["pool", "ppo", "evaluate"]
    assert "to learn from" not in render_plan(plan)


def test_ppo_on_an_evaluator_pays_for_judgements(rlp_tree):
    plan = plan_of(rlp_tree, **EVALUATOR, select__strategy="k_center")
    assert (plan.num_label_queries, plan.num_pairs, plan.num_responses, plan.num_eval_queries) == (10, 0, 40, 4)
    assert names(plan) == ["pool", "generate", "select", "query", "fit_evaluator", "ppo", "evaluate"]
    config = changed(rlp_tree, **EVALUATOR, select__budget=41)
    assert "select.budget must be at most the 40 responses" in refusal(ConfigError, config)


def test_the_diagnosis_is_paid_beside_the_evaluation(rlp_tree):
    plan = plan_of(rlp_tree, evaluate__diagnosis_budget=36, evaluate__budget=3)
    assert plan.num_eval_queries == 3 + 36
    assert any("judges 1 of the 2 held-out prompts, at 3 queries each" in warning for warning in plan.warnings)


def test_comparisons_with_references_are_paid_beside_the_scores(rlp_tree, tmp_path):
    path = save_rows(tmp_path / "answers.jsonl", [{"prompt": "p 1", "response": "a"}])

    def references(order, **changes):
        return plan_of(rlp_tree, evaluate__reference_answers={"path": path, "order": order}, **changes)

    whole = references("random", evaluate__budget=12)
    assert (whole.num_eval_queries, whole.num_eval_comparisons) == (2 * (3 + 3), 6)
    assert "12 evaluation queries (6 comparisons with references)" in render_plan(whole)
    short = references("both", evaluate__budget=17)
    assert (short.num_eval_queries, short.num_eval_comparisons) == (3 + 6, 6)
    assert any("judges 1 of the 2 held-out prompts, at 9 queries each" in warning for warning in short.warnings)
    scored = references("both", oracle__compare_function=None, **FUNCTION)
    assert (scored.num_eval_queries, scored.num_eval_comparisons) == (2 * (2 + 1), 0)
    assert "comparisons with" not in render_plan(scored)


def test_the_ledgers_caps_are_all_label_queries_and_both_budgets_of_the_evaluation(tree, rlp_tree):
    test = {"test": 60}
    assert plan_of(tree, rounds=3).budgets == {"label": 10, "evaluate": 4} | test
    assert plan_of(tree, labels="expert").budgets == {"label": 40, "evaluate": 4} | test
    diagnosed = plan_of(rlp_tree, select__budget=9, evaluate__diagnosis_budget=36)
    assert diagnosed.budgets == {"label": 8, "evaluate": 42} | test
    assert plan_of(rlp_tree, **FUNCTION).budgets == {"label": 0, "evaluate": 6} | test
