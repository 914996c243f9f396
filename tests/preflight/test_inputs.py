"""Files, modules, keys and packages that a run needs, and prompts that do not fit the context."""

import importlib.util
import sys

import pytest

from rayrl.errors import ConfigError, DataError
from rayrl.preflight import check
from tests.chat_policies import BROKEN, CHATML, TOOLS_NONE, TYPE_ERROR, chat_policy
from tests.preflight.trees import EVALUATOR, FUNCTION, TWO_CPUS, changed, plan_of, refusal, save_rows


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pool__path": "gone.jsonl"}, "gone.jsonl does not exist"),
        (
            {"pool__prompt_column": "promt"},
            "no column promt; the columns there are prompt; did you mean prompt?",
        ),
        ({"seed_data": {"path": "gone.csv"}}, "gone.csv does not exist"),
        ({"evaluate__reference_answers": {"path": "gone.csv"}}, "gone.csv does not exist"),
        ({"oracle": {"type": "replay", "path": "gone.csv"}}, "gone.csv does not exist"),
    ],
)
def test_missing_files_and_columns_are_refused(tree, changes, message):
    assert message in refusal(DataError, changed(tree, **changes))


def test_empty_inputs_are_refused(tree, tmp_path):
    empty = save_rows(tmp_path / "empty.jsonl", [])
    blank = save_rows(tmp_path / "blank.jsonl", [{"prompt": " "}])
    assert "is empty" in refusal(DataError, changed(tree, pool__path=empty))
    message = refusal(DataError, changed(tree, pool__path=blank))
    assert message.endswith("no prompt that is not empty (1 rows); add prompts, or correct pool.prompt_column")
    seed = {"path": save_rows(tmp_path / "s.jsonl", [{"prompt": "a", "response": "b", "score": 1}])}
    seed |= {"score_column": "score", "min_score": 2}
    message = refusal(DataError, changed(tree, seed_data=seed))
    assert message.endswith("1 score below seed_data.min_score; lower seed_data.min_score, or complete the rows")


def test_prompts_that_fill_the_context_are_refused(tree, tmp_path):
    rows = [{"prompt": "w " * n + str(n)} for n in (5, 6, 7, 20, 31, 32, 40, 50)]
    config = changed(
        tree, pool__path=save_rows(tmp_path / "long.jsonl", rows), policy__max_model_len=32, select__budget=4
    )
    message = refusal(DataError, changed(config.model_dump(), evaluator__type="scalar"))
    assert message.startswith("pool.path: a prompt must be shorter than the context of 32 tokens, but 4 of 8 are not")
    assert "long.jsonl, row 5, with 32); the longest has 51. " in message and 'on_bad_row = "drop"' in message
    dropping = changed(config.model_dump(), evaluator__type="scalar", pool__on_bad_row="drop", select__budget=2)
    plan = check(dropping, cluster=TWO_CPUS)
    assert plan.num_prompts == 2
    assert any(
        "pool: dropped 4 bad rows, the first of them " in w and "long.jsonl, row 5: " in w for w in plan.warnings
    )
    save_rows(tmp_path / "long.jsonl", rows[:4])
    plan = check(changed(config.model_dump(), evaluator__type="scalar"), cluster=TWO_CPUS)
    assert any("pool: 1 prompts (the longest has 21 tokens) leave less than" in w for w in plan.warnings)
    assert "rubric.template must leave room in the context of 32" in refusal(ConfigError, config)
    message = refusal(ConfigError, changed(tree, policy__max_model_len=2000))
    assert (
        "policy.max_model_len must be at most the model's context 1024, got 2000; lower it, or leave it out" in message
    )


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_a_tracker_without_its_package_is_refused(tree, name):
    config = changed(tree, **{f"tracking__{name}": {}})
    if importlib.util.find_spec(name) is None:
        assert refusal(ConfigError, config) == (
            f"tracking.{name} needs the package {name}, which is not installed here; "
            f"pip install {name}, or leave the table out"
        )
    else:
        check(config, cluster=TWO_CPUS)


def test_a_function_that_is_not_there_is_refused(rlp_tree):
    message = refusal(ConfigError, changed(rlp_tree, **FUNCTION | {"ppo__function": "no_such_module:reward"}))
    assert (
        'ppo.function must be "module:function", importable from' in message
        and "there is no no_such_module.py" in message
    )


def test_benchmarks_that_cannot_run_are_refused(tree, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    assert refusal(ConfigError, changed(tree, evaluate__lm_eval={"tasks": ["mmlu"]})) == (
        "evaluate.lm_eval.tasks needs lm-evaluation-harness, which is not installed here, got ['mmlu']; "
        "pip install lm_eval, or empty the list"
    )
    message = refusal(ConfigError, changed(tree, evaluate__lm_eval={"include_path": "/nowhere"}))
    assert message.endswith("must be a folder, got /nowhere; correct it, or leave it out")


def test_a_table_of_comparisons_cannot_judge(rlp_tree, tmp_path):
    rows = [{"prompt": "p", "first": "a", "second": "b", "preference": "tie"}]
    oracle = {"type": "replay", "comparisons_path": save_rows(tmp_path / "compared.jsonl", rows)}
    assert "oracle.path is missing" in refusal(ConfigError, changed(rlp_tree, oracle=oracle))
    plan_of(rlp_tree, oracle=oracle, evaluate__budget=0)
    gone, unnamed = oracle | {"comparisons_path": "gone.jsonl"}, oracle | {"preference_column": "winner"}
    assert "gone.jsonl does not exist" in refusal(DataError, changed(rlp_tree, oracle=gone, evaluate__budget=0))
    message = refusal(DataError, changed(rlp_tree, oracle=unnamed, evaluate__budget=0))
    assert "has no column winner; the columns there are prompt, first, second, preference" in message
    for judged in ({"evaluate__diagnosis_budget": 36}, EVALUATOR, {"pipeline": "proxy_dpo"}):
        config = changed(rlp_tree, oracle=oracle, evaluate__budget=0, **judged)
        assert "oracle.path is missing" in refusal(ConfigError, config)


def chats_of(tmp_path, template=CHATML, name="gpt", **policy):
    """Settings of a pool of 13 chats with an answer, and a policy of this template."""
    chats = [
        {"chat": [{"from": "human", "value": f"How do I mend {n} chairs?"}, {"from": name, "value": "Use glue."}]}
        for n in range(13)
    ]
    return {
        "policy__path": chat_policy(tmp_path / "chat", template, **policy).path,
        "pool__path": save_rows(tmp_path / "chats.jsonl", chats),
        "pool__messages_column": "chat",
    }


def test_answers_of_any_published_assistant_are_no_part_of_the_prompts(tree, tmp_path):
    plans = [plan_of(tree, **chats_of(tmp_path / name, name=name)) for name in ("chatgpt", "gpt")]
    assert plans[0].num_prompts == plans[1].num_prompts == 11
    assert "got 'narrator'; rename it" in refusal(
        DataError, changed(tree, **chats_of(tmp_path / "other", name="narrator"))
    )


def test_templates_and_tokenizers_that_the_run_would_refuse_are_refused(tree, tmp_path):
    assert plan_of(tree, **chats_of(tmp_path / "a", TOOLS_NONE)).num_prompts == 11
    broken = refusal(ConfigError, changed(tree, **chats_of(tmp_path / "b", BROKEN)))
    assert "policy.path: the tokenizer's chat template must be valid Jinja" in broken
    failing = refusal(DataError, changed(tree, **chats_of(tmp_path / "c", TYPE_ERROR)))
    assert "chats.jsonl, row 1: the policy's chat template refuses these messages" in failing
    endless = refusal(ConfigError, changed(tree, **chats_of(tmp_path / "d", without=["eos_token"])))
    assert "a tokenizer with an end-of-sequence token" in endless


def test_a_rubric_in_double_braces_is_refused(tree, tmp_path):
    (tmp_path / "rubric.txt").write_text("{{prompt}} {{response}}")
    message = refusal(ConfigError, changed(tree, rubric__template=str(tmp_path / "rubric.txt")))
    assert "rubric.template must name its slots in single braces, got {{prompt}}" in message
