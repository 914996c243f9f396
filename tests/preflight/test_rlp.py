"""The second pipeline before work starts: what it will do and pay, and every plan that could not end well."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from rayrl.config import RubricConfig, RunConfig
from rayrl.errors import ConfigError, DataError, ResourceError
from rayrl.models.judge_prompt import ADDITIVE_RUBRIC, ANSWER_FORMAT, evaluator_prompt, load_rubric
from rayrl.models.pairwise_prompt import PAIRWISE_RUBRIC
from rayrl.preflight import check, render_plan
from rayrl.runs.run import open_run
from tests.preflight.test_check import TWO_CPUS, changed, refusal, save_model, save_rows, small_tree

MNLI = {"0": "CONTRADICTION", "1": "NEUTRAL", "2": "ENTAILMENT"}
JUDGE = {"type": "http", "base_url": "http://127.0.0.1:9", "model": "m", "api_key_env": None}
EVALUATOR = {"ppo__reward": "evaluator", "preferences": None}
LAST = ("evaluate", "report")
FUNCTION = {"ppo__reward": "function", "ppo__function": "json:dumps", "preferences": None}


@pytest.fixture
def tree(tmp_path):
    """A run of 12 prompts, 2 held out; the expert compares 2 of 4 responses each. Tests change what they are about."""
    return small_tree(tmp_path) | {
        "pipeline": "rlp",
        "generate": {"k": 4, "max_tokens": 16, "block_size": 4},
        "select": {"budget": 10, "strategy": "random"},
        "oracle": {"type": "scripted", "function": "json:dumps", "compare_function": "json:loads"},
        "preferences": {"source": "oracle"},
        "refresh": {"n": 3, "spg": {"entailment_model": save_model(tmp_path / "nli", id2label=MNLI)}},
        "evaluate": {"budget": 6},
    }


def plan_of(tree, cluster=TWO_CPUS, **changes):
    return check(changed(tree, **changes), cluster=cluster)


def names(plan):
    return [stage.name for stage in plan.stages]


def pairs_of(tmp_path, rows):
    return {"source": "data", "data": {"path": save_rows(tmp_path / "pairs.jsonl", rows)}}


PAIRS = [{"prompt": p, "chosen": "good", "rejected": "bad"} for p in ("p", "q", "q")]


def test_the_plan_counts_what_will_be_compared_and_sampled(tree):
    plan = plan_of(tree)
    assert (plan.num_prompts, plan.num_label_queries, plan.num_pairs) == (10, 10, 5)
    assert plan.num_responses == 10 * 4 + 10 * 3
    assert plan.num_eval_queries == 6  # M1, pi and pi^ on two prompts
    assert names(plan) == (
        ["generate", "preferences", "fit_reward_model", "ppo", "synthesize", "refresh", "ppo_refreshed", *LAST]
    )
    text = render_plan(plan)
    assert "10 prompts, 70 responses besides PPO's own, and 2 prompts held out" in text
    assert "5 to learn from" in text and "replicas stay up beside every training" in text
    assert "scoring streams" not in text and "per paid query" not in text and "reference log" not in text


def test_a_sampled_part_of_the_pool_is_counted_in_whole_blocks(tree):
    assert plan_of(tree, refresh__num_prompts=5).num_responses == 10 * 4 + 8 * 3
    assert plan_of(tree, refresh__num_prompts=500).num_responses == 10 * 4 + 10 * 3
    assert plan_of(tree, refresh__method="none").num_responses == 10 * 4


def test_a_file_of_pairs_is_not_paid_for(tree, tmp_path):
    plan = plan_of(tree, preferences=pairs_of(tmp_path, PAIRS))
    assert (plan.num_label_queries, plan.num_pairs, plan.num_responses) == (0, 3, 30)
    assert "generate" not in names(plan)


def test_ppo_on_a_function_pays_for_no_labels_whatever_the_other_tables_say(tree):
    plan = plan_of(tree, **FUNCTION | {"preferences": {"source": "oracle"}}, evaluate__diagnosis_budget=36)
    assert (plan.num_label_queries, plan.num_pairs, plan.num_responses, plan.num_eval_queries) == (0, 0, 0, 4)
    assert names(plan) == ["ppo", "evaluate", "report"]
    assert "to learn from" not in render_plan(plan)


def test_ppo_on_an_evaluator_pays_for_judgements(tree):
    plan = plan_of(tree, **EVALUATOR, select__strategy="k_center")
    assert (plan.num_label_queries, plan.num_pairs, plan.num_responses, plan.num_eval_queries) == (10, 0, 40, 4)
    assert names(plan) == ["generate", "select", "query", "fit_evaluator", "ppo", "evaluate", "report"]
    config = changed(tree, **EVALUATOR, select__budget=41)
    assert "select.budget must be at most the 40 responses" in refusal(ConfigError, config)


def test_the_diagnosis_is_paid_beside_the_evaluation(tree):
    plan = plan_of(tree, evaluate__diagnosis_budget=36, evaluate__budget=3)
    assert plan.num_eval_queries == 3 + 36
    assert any("judges 1 of the 2 held-out prompts, at 3 queries each" in warning for warning in plan.warnings)


def test_comparisons_with_references_are_paid_beside_the_scores(tree, tmp_path):
    path = save_rows(tmp_path / "answers.jsonl", [{"prompt": "p 1", "response": "a"}])

    def references(order, **changes):
        return plan_of(tree, evaluate__reference_answers={"path": path, "order": order}, **changes)

    whole = references("random", evaluate__budget=12)
    assert (whole.num_eval_queries, whole.num_eval_comparisons) == (2 * (3 + 3), 6)
    assert "12 evaluation queries (6 comparisons with references)" in render_plan(whole)
    short = references("both", evaluate__budget=17)
    assert (short.num_eval_queries, short.num_eval_comparisons) == (3 + 6, 6)
    assert any("judges 1 of the 2 held-out prompts, at 9 queries each" in warning for warning in short.warnings)
    scored = references("both", oracle__compare_function=None, **FUNCTION)
    assert (scored.num_eval_queries, scored.num_eval_comparisons) == (2 * (2 + 1), 0)
    assert "comparisons with" not in render_plan(scored)


def test_a_budget_for_more_pairs_than_prompts_is_told(tree):
    (warning,) = [w for w in plan_of(tree, select__budget=31).warnings if "select.budget" in w]
    assert "select.budget = 31 is not spent whole" in warning and "make 20 comparisons" in warning
    assert not [w for w in plan_of(tree, select__budget=20).warnings if "select.budget" in w]


def test_comparisons_are_priced_as_such(tree, tmp_path):
    """Price per input token only: two prompts of their own lengths, with two responses and one."""
    prices = {"usd_per_1m_input": 1e6, "usd_per_1m_output": 0.0}
    both = plan_of(tree, oracle=JUDGE | prices).usd
    answers = {"path": save_rows(tmp_path / "answers.jsonl", [{"prompt": "p 1", "response": "a"}])}
    with_references = plan_of(tree, oracle=JUDGE | prices, evaluate={"budget": 12, "reference_answers": answers}).usd
    labels = plan_of(tree, oracle=JUDGE | prices, evaluate__budget=0).usd
    judged = plan_of(tree, oracle=JUDGE | prices, evaluate__budget=0, **EVALUATOR).usd

    def words(text):
        return len(text.replace("{prompt}", "").replace("{first}", "").replace("{second}", "").split())

    pointwise = words((ADDITIVE_RUBRIC + ANSWER_FORMAT).replace("{response}", "")) + 2 + 16
    pairwise = words(PAIRWISE_RUBRIC) + 2 + 2 * 16
    assert labels == pytest.approx(10 * pairwise)
    assert with_references == pytest.approx(both + 6 * pairwise)
    assert judged == pytest.approx(10 * pointwise)
    assert both == pytest.approx(labels + 6 * pointwise)


def test_money_that_ends_before_the_labels_is_told(tree):
    oracle = JUDGE | {"usd_per_1m_input": 0.0, "usd_per_1m_output": 1000.0, "max_tokens": 100}
    (warning,) = [w for w in plan_of(tree, oracle=oracle | {"budget_usd": 0.9}).warnings if "USD" in w]
    assert "may cost 1.60 USD, and oracle.budget_usd stops them at 0.90, before all labels are asked for" in warning
    (warning,) = [w for w in plan_of(tree, oracle=oracle | {"budget_usd": 1.1}).warnings if "USD" in w]
    assert warning.endswith("stops them at 1.10")


# Models beside the policy.


def test_an_entailment_model_that_is_none_is_refused(tree, tmp_path):
    message = refusal(ConfigError, changed(tree, refresh__spg__entailment_model="/nowhere/nli"))
    assert "refresh.spg.entailment_model must be a model folder or a hub id, got /nowhere/nli" in message
    two = save_model(tmp_path / "two", id2label={"0": "NO", "1": "YES"})
    message = refusal(ConfigError, changed(tree, refresh__spg__entailment_model=two))
    assert "must have the labels contradiction, neutral, entailment" in message and "NO, YES" in message
    assert "with none" in refusal(ConfigError, changed(tree, refresh__spg__entailment_model=tree["policy"]["path"]))
    for unused in ({"refresh__spg__clustering": "embedding"}, {"refresh__method": "uml"}, FUNCTION):
        plan_of(tree, **unused, refresh__spg__entailment_model="/nowhere/nli")


def test_an_embedder_that_is_none_is_refused(tree):
    message = refusal(ConfigError, changed(tree, refresh__spg__embedder="/nowhere/sentences"))
    assert "refresh.spg.embedder must be a model folder or a hub id, got /nowhere/sentences" in message
    plan_of(tree, refresh__spg__embedder="/nowhere/sentences", refresh__method="ocrm")


def test_workers_get_absolute_paths_of_every_model(tree, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    refresh = {"spg": {"entailment_model": "nli", "embedder": "model"}}
    run = open_run(changed(tree, reward_model={"path": "model"}, refresh=refresh))
    assert run.config.refresh.spg.entailment_model == str(tmp_path / "nli")
    assert run.config.refresh.spg.embedder == run.config.reward_model.path == str(tmp_path / "model")
    run = open_run(changed(tree, run_dir=str(tmp_path / "hub"), refresh={"spg": {"entailment_model": "me/nli"}}))
    assert (run.config.refresh.spg.entailment_model, run.config.refresh.spg.embedder) == ("me/nli", None)


# Room: whatever fleet is up stays up.


@pytest.mark.parametrize(
    ("changes", "fits", "num_gpus", "message"),
    [
        # one generator and one trainer of r, while M1's responses are compared; a file of pairs needs no generator
        (
            {"reward_model__num_workers": 3, "refresh__method": "none"},
            {"preferences__source": "data"},
            3,
            "stage fit_reward_model .*3 worker.*beside 1 engine.* needs GPU: 4, .* lower reward_model.num_workers or",
        ),
        (
            {"reward_model__num_workers": 2},
            {"refresh__method": "none"},
            3,
            r"stage refresh .*beside 1 engine\(s\) and 1 engine\(s\)\) needs GPU: 4",
        ),
        (
            {"refresh__spg__num_replicas": 2, "select__pooling": "last"},
            {"refresh__spg__clustering": "embedding"},
            3,
            r"stage synthesize \(2 entailment model\(s\), beside .* needs GPU: 4, .* lower refresh.spg.num_replicas or",
        ),
        # embeddings that pool otherwise than the reward model does have a fleet of their own
        (
            {"refresh__spg__clustering": "embedding", "embedders__num_replicas": 2},
            {"select__pooling": "last"},
            4,
            "stage synthesize .* needs GPU: 5",
        ),
        # and they are what is tried where entailment accepts nothing
        ({"embedders__num_replicas": 2}, {"select__pooling": "last"}, 4, "stage synthesize .* needs GPU: 5"),
        (
            {"ppo__num_workers": 2},
            FUNCTION,
            3,
            r"stage ppo \(2 worker.* needs GPU: 4, .* lower ppo.num_workers or generators.num_replicas or embedders",
        ),
        (
            EVALUATOR | {"evaluator__type": "scalar", "ppo__num_workers": 2},
            {"evaluator__type": "generative"},
            3,
            "GPU: 4",
        ),
        # in a later round the replicas that reward are up from the first one on
        (
            {"reward_model__num_workers": 2, "refresh__method": "none", "rounds": 2},
            {"rounds": 1},
            3,
            r"stage fit_reward_model .*beside 1 engine\(s\) and 1 engine\(s\)\) needs GPU: 4",
        ),
        (
            {"select__strategy": "k_center", "embedders__num_replicas": 2, "rounds": 2},
            {"rounds": 1, "select__pooling": "last"},
            4,
            "stage select .* needs GPU: 5",
        ),
        (
            EVALUATOR | {"evaluator__type": "scalar", "evaluator__num_workers": 2, "rounds": 2},
            {"rounds": 1},
            3,
            "stage fit_evaluator .* needs GPU: 4",
        ),
        (EVALUATOR | {"evaluator__num_workers": 3}, {"evaluator__num_workers": 2}, 3, "fit_evaluator .* needs GPU: 4"),
        (
            EVALUATOR | {"select__strategy": "k_center", "embedders__num_replicas": 3},
            {"select__strategy": "random"},
            3,
            "stage select .* needs GPU: 4",
        ),
    ],
)
def test_a_stage_without_room_beside_the_fleets_is_refused(tree, tmp_path, changes, fits, num_gpus, message):
    cluster = {"CPU": 9.0, "GPU": float(num_gpus)}
    tree["preferences"] = pairs_of(tmp_path, PAIRS) | {"source": "oracle"}
    found = refusal(ResourceError, changed(tree, **changes), cluster)
    assert re.search(message, found), found
    plan_of(tree, cluster, **changes | fits)


def test_the_disk_must_hold_every_model_and_both_optimizers(tree):
    weights = Path(tree["policy"]["path"], "model.safetensors")
    os.truncate(weights, 1000)  # 250 float32 parameters
    tables = 70 * 16 * 40
    # r and r^; last and best, twice; two served; and a fit has three checkpoints at once, of two optimizers
    assert plan_of(tree).disk_bytes == 8 * 1000 + 3 * 2 * 12 * 250 + tables
    assert plan_of(tree, reward_model__num_members=3).disk_bytes == 12 * 1000 + 3 * 2 * 12 * 250 + tables
    one_fewer = plan_of(tree, refresh__method="none").disk_bytes
    assert one_fewer == 7 * 1000 + 3 * 2 * 12 * 250 + 40 * 16 * 40
    lora = {"rank": 4}
    assert plan_of(tree, ppo__lora=lora).disk_bytes == 8 * 1000 + 3 * 12 * 250 + tables
    assert plan_of(tree, **FUNCTION).disk_bytes == 4 * 1000 + 3 * 2 * 12 * 250
    os.truncate(weights, 2**42)
    assert "GiB at least (weights and optimizer), and its disk has" in refusal(ResourceError, changed(tree))


# What is read and asked.


def test_a_rubric_that_fills_the_context_is_refused_where_a_model_reads_it(tree):
    small = {"policy__max_model_len": 32, "select__budget": 4}
    message = refusal(ConfigError, changed(tree, **small, refresh__method="self_judged"))
    assert "must leave room in the context of 32 tokens" in message and "set another refresh.method" in message
    assert 'set evaluator.type = "scalar"' in refusal(ConfigError, changed(tree, **small, **EVALUATOR))
    for reads_nothing in (
        {},
        {"evaluator__type": "scalar", **EVALUATOR},
        FUNCTION | {"refresh__method": "self_judged"},
    ):
        plan_of(tree, **small, **reads_nothing)
    num_tokens = len(evaluator_prompt(load_rubric(RubricConfig()), "", "", "score_first").split())
    plan = plan_of(tree, policy__max_model_len=num_tokens + 10, refresh__method="self_judged")
    assert any("evaluator: rubric" in warning and "may exceed" in warning for warning in plan.warnings)


def test_pairs_without_room_in_the_context_are_refused_and_cut_ones_counted(tree, tmp_path):
    def prompts(*lengths):
        rows = [{"prompt": "w " * (n - 1) + f"{n}", "chosen": "a b c", "rejected": "d"} for n in lengths]
        return {"preferences": pairs_of(tmp_path, rows), "policy__max_model_len": 20}

    message = refusal(ConfigError, changed(tree, **prompts(20, 21, 30)))
    assert "preferences.data.path: a prompt must be shorter than the context of 20 tokens" in message
    assert "none of the 3 pairs" in message and "the shortest has 20" in message and "policy.max_model_len" in message
    plan = plan_of(tree, **prompts(5, 16, 17, 25))
    assert any("cuts an answer of 2 of 4 pairs" in warning for warning in plan.warnings)
    assert not [w for w in plan_of(tree, **prompts(5, 16)).warnings if "preferences" in w]


def test_nccl_needs_a_gpu_for_each_of_its_ranks(tree):
    nccl = {"ppo__weight_transfer": "nccl"}
    assert "ppo.weight_transfer must be" in refusal(ConfigError, changed(tree, **nccl))
    gpus = {"CPU": 8.0, "GPU": 8.0}
    shared = changed(tree, **nccl, generators={"gpus_per_replica": 0.5})
    message = refusal(ConfigError, shared, cluster=gpus)
    assert "generators.gpus_per_replica must be at least 1" in message and "got 0.5" in message
    plan_of(tree, cluster=gpus, **nccl)
    plan_of(tree, cluster=gpus, generators={"gpus_per_replica": 0.5})
    plan_of(tree, ppo__weight_transfer="folder")


def test_a_function_that_is_not_there_is_refused(tree):
    message = refusal(ConfigError, changed(tree, **FUNCTION | {"ppo__function": "no_such_module:reward"}))
    assert "ppo.function must be importable" in message and "there is no module no_such_module" in message


@pytest.mark.parametrize("function", ["builtins:len", "math:dist", "os:getpid"])
def test_a_function_without_text_is_refused_before_work_starts(tree, function):
    config = changed(tree, **FUNCTION | {"ppo__function": function})
    plan_of(tree, **FUNCTION | {"ppo__function": function})  # a plan does not import the user's code
    message = refusal(ConfigError, config, contact_oracle=True)
    assert "ppo.function must be written in Python" in message and f'got "{function}"' in message
    check(changed(tree, **FUNCTION), cluster=TWO_CPUS, contact_oracle=True)
    message = refusal(ConfigError, changed(tree, **FUNCTION | {"ppo__function": "json:nothing"}), contact_oracle=True)
    assert "module json has no function nothing" in message


def test_a_table_of_comparisons_cannot_judge(tree, tmp_path):
    rows = [{"prompt": "p", "first": "a", "second": "b", "preference": "tie"}]
    oracle = {"type": "replay", "comparisons_path": save_rows(tmp_path / "compared.jsonl", rows)}
    assert "oracle.path is missing" in refusal(ConfigError, changed(tree, oracle=oracle))
    plan_of(tree, oracle=oracle, evaluate__budget=0)
    gone, unnamed = oracle | {"comparisons_path": "gone.jsonl"}, oracle | {"preference_column": "winner"}
    assert "gone.jsonl does not exist" in refusal(DataError, changed(tree, oracle=gone, evaluate__budget=0))
    message = refusal(DataError, changed(tree, oracle=unnamed, evaluate__budget=0))
    assert "has no column winner; the columns there are prompt, first, second, preference" in message
    for judged in ({"evaluate__diagnosis_budget": 36}, EVALUATOR, {"pipeline": "proxy_dpo"}):
        config = changed(tree, oracle=oracle, evaluate__budget=0, **judged)
        assert "oracle.path is missing" in refusal(ConfigError, config)


def test_a_plan_loads_nothing_heavy(tree):
    program = (
        "import sys; from rayrl.config import RunConfig; from rayrl.preflight import check, render_plan\n"
        "render_plan(check(RunConfig.model_validate_json(sys.argv[1])))\n"
        "heavy = ('torch', 'ray', 'vllm', 'transformers', 'datasets', 'openai')\n"
        "print([m for m in heavy if m in sys.modules])"
    )
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    command = [sys.executable, "-c", program, json.dumps(RunConfig.model_validate(tree).model_dump(mode="json"))]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert (done.stdout.strip(), done.returncode) == ("[]", 0), done.stderr[-2000:]
