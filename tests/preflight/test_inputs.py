"""Files, modules, keys and packages that a run needs, and prompts that do not fit the context."""

import importlib.util
import sys

import pyarrow as pa
import pyarrow.parquet as pq
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


def warned(plan, text):
    return any(text in warning for warning in plan.warnings)


def texts(folder, name, content):
    (folder / name).write_text(content)
    return str(folder / name)


def test_an_index_of_pandas_a_pattern_and_far_dates_are_no_hindrance(tree, tmp_path):
    indexed = "".join(f"{n},p {n}\n" for n in range(12))
    assert plan_of(tree, pool__path=texts(tmp_path, "index.csv", f",prompt\n{indexed}")).num_prompts == 10
    for part in range(3):
        save_rows(tmp_path / f"part-{part}.jsonl", [{"prompt": f"p {part} {n}"} for n in range(4)])
    assert plan_of(tree, pool__path=f"{tmp_path}/part-*.jsonl").num_prompts == 10
    far = pa.array([300_000_000_000_000] * 12, pa.timestamp("ms"))
    pq.write_table(pa.table({"prompt": [f"p {n}" for n in range(12)], "at": far}), tmp_path / "far.parquet")
    assert plan_of(tree, pool__path=str(tmp_path / "far.parquet")).num_prompts == 10


def test_two_columns_of_a_name_and_half_characters_are_refused(tree, tmp_path):
    twice = texts(tmp_path, "twice.csv", "prompt,prompt\na,b\n")
    assert refusal(DataError, changed(tree, pool__path=twice)).startswith("pool.path: ")
    half = texts(tmp_path, "half.jsonl", '{"prompt": "I like \\ud83d cakes"}\n')
    assert "half.jsonl, row 1: column prompt holds half a character" in refusal(
        DataError, changed(tree, pool__path=half)
    )


def test_the_plan_tells_what_is_dropped_and_what_is_not_read(tree, tmp_path):
    rows = [{"instruction": f"p {n}", "input": "x", "history": [["a", "b"]]} for n in range(12)]
    plan = plan_of(
        tree,
        pool__path=save_rows(tmp_path / "a.jsonl", [*rows, {"instruction": 3}]),
        pool__prompt_column="instruction",
        pool__on_bad_row="drop",
    )
    assert (plan.num_prompts, plan.test_prompts[0].text) == (10, "p 0\n\nx")
    assert warned(plan, "pool: dropped 1 bad rows, the first of them ")
    assert warned(plan, "pool: 12 rows hold something in the column history, which is not read")
    dialogue = "\n\nHuman: a\n\nAssistant: b"
    lines = [{"prompt": text} for text in ("nan", dialogue, *(f"p {n}" for n in range(12)))]
    plan = plan_of(tree, pool__path=save_rows(tmp_path / "b.jsonl", lines))
    assert warned(plan, "pool: 1 prompts are but a word for an empty cell")
    assert warned(plan, "pool: 1 prompts are whole dialogues")


def test_columns_beside_reference_answers_that_are_not_read_are_told(tree, tmp_path):
    rows = [{"prompt": "q", "response": "r", "system": "Be brief."}, {"prompt": 3}]
    answers = {"path": save_rows(tmp_path / "answers.jsonl", rows), "on_bad_row": "drop"}
    plan = plan_of(tree, evaluate__reference_answers=answers)
    assert warned(plan, "evaluate.reference_answers: 1 rows hold something in the column system, which is not read")
    assert warned(plan, "evaluate.reference_answers: dropped 1 bad rows")


def test_seed_rows_are_read_to_the_end(tree, tmp_path):
    rows = [{"prompt": f"q {n}", "response": "r", "score": n} for n in range(3000)]
    path = save_rows(tmp_path / "seed.jsonl", [*rows, {"prompt": "q", "response": 7, "score": None}])
    message = refusal(DataError, changed(tree, seed_data={"path": path}))
    assert message.startswith("seed_data.path: ") and "seed.jsonl, row 3001: column response must be text" in message
    plan = plan_of(tree, seed_data={"path": path, "on_bad_row": "drop"})
    assert warned(plan, "seed_data: dropped 1 bad rows, the first of them ")
    scored = {"path": path, "on_bad_row": "drop", "score_column": "score", "min_score": 1}
    assert warned(plan_of(tree, seed_data=scored), "seed_data: 1 rows have no score (an empty cell, or NaN)")


def test_reference_answers_are_read_to_the_end(tree, tmp_path):
    rows = [{"prompt": f"q {n}", "response": "r"} for n in range(30)]
    path = save_rows(tmp_path / "answers.jsonl", [*rows, {"prompt": 7, "response": "r"}])
    message = refusal(DataError, changed(tree, evaluate__reference_answers={"path": path}))
    assert message.startswith("evaluate.reference_answers.path: ") and "row 31: column prompt must be text" in message
    path = save_rows(tmp_path / "blank.jsonl", [{"prompt": "q", "response": ""}])
    assert "has no row with a prompt and an answer" in refusal(
        DataError, changed(tree, evaluate__reference_answers={"path": path})
    )


def test_tables_of_answers_are_read_as_the_run_reads_them(tree, tmp_path):
    rows = [{"prompt": f"p {n}", "response": "r", "score": 3} for n in range(12)]

    def plan_with(name, rows):
        return changed(tree, oracle={"type": "replay", "path": save_rows(tmp_path / name, rows)})

    assert not warned(check(plan_with("a.jsonl", rows), cluster=TWO_CPUS), "oracle.path")
    message = refusal(DataError, plan_with("b.jsonl", [*rows, rows[0] | {"score": "4/5"}]))
    assert message.startswith("oracle.path: ") and "row 13: column score must be a number, got '4/5'" in message
    plan = check(plan_with("c.jsonl", [*rows, rows[0] | {"score": 5}]), cluster=TWO_CPUS)
    assert warned(plan, "1 rows contradict an earlier row about the same, which counts (the first: ")
    plan = check(plan_with("d.jsonl", [{"prompt": "other", "response": "r", "score": 3}]), cluster=TWO_CPUS)
    assert warned(plan, "none of the 12 prompts of the pool that were looked for is in the table")
