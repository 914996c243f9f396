"""Preferences that cannot be had are refused before work starts: field, rule, value and remedy in one message."""

import json
import re

import pytest

from rayrl.config import RunConfig
from rayrl.errors import ConfigError, DataError
from rayrl.preflight.model import ModelFacts
from rayrl.preflight.preferences import inspect_preferences
from tests.preflight.trees import changed, pairs_of, plan_of
from tests.preflight.trees import refusal as refusal_of_run

PAIRS = [{"prompt": p, "chosen": "good", "rejected": "bad"} for p in ("p", "q", "q")]
ORACLE = {"source": "oracle"}


def save(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def config_of(preferences, *, budget=4, k=4, oracle=None, rubric=None):
    return RunConfig.model_validate(
        {
            "name": "t",
            "run_dir": "/nowhere",
            "pipeline": "rlp",
            "policy": {"path": "model"},
            "pool": {"path": "pool.jsonl"},
            "sft": {"enabled": False},
            "generate": {"k": k},
            "select": {"budget": budget},
            "oracle": oracle or {"type": "scripted", "function": "json:dumps", "compare_function": "json:loads"},
            "preferences": preferences,
            "rubric": rubric or {},
        }
    )


def inspect(preferences, **settings):
    return inspect_preferences(config_of(preferences, **settings), ModelFacts())


def refusal(error, preferences, **settings):
    with pytest.raises(error) as caught:
        inspect(preferences, **settings)
    assert type(caught.value) is error
    return str(caught.value)


def test_a_file_of_pairs_is_counted(tmp_path):
    counts = inspect({"data": {"path": save(tmp_path / "a.jsonl", PAIRS)}}).counts
    assert (counts.num_rows, counts.num_pairs, len(counts.prompt_ids)) == (3, 3, 2)


def test_columns_beside_pairs_that_are_not_read_are_told(tmp_path):
    rows = [row | {"system": "Answer in French."} for row in PAIRS]
    (warning,) = inspect({"data": {"path": save(tmp_path / "a.jsonl", rows)}}).warnings()
    assert warning.startswith("preferences: 3 rows hold something in the column system, which is not read")


def test_a_policy_that_is_not_here_does_not_keep_chats_from_being_read(tmp_path):
    chats = [{"chat": [{"role": "user", "content": p}], "chosen": "a", "rejected": "b"} for p in "pq"]
    facts = inspect({"data": {"path": save(tmp_path / "a.jsonl", chats), "messages_column": "chat"}})
    assert facts.counts.num_pairs == 2


@pytest.mark.parametrize(
    ("rows", "text"),
    [
        (None, "a.jsonl does not exist"),
        ([], "is empty: at least one row is needed"),
        ([{"prompt": "p", "chosen": "a", "reject": "b"}], "no column rejected; .* did you mean reject"),
        ([*PAIRS, PAIRS[0] | {"rejected": "good"}], r"must differ, and 1 pairs do not \(row 4\); remove those rows"),
        ([PAIRS[0] | {"chosen": ""}], "pairs of at least 2 prompts, and has 0 pairs of 0: of 1 rows 1 lack a prompt"),
        (PAIRS[1:], "pairs of at least 2 prompts, and has 2 pairs of 1: .*; add pairs of other prompts$"),
    ],
)
def test_unusable_files_are_refused(tmp_path, rows, text):
    if rows is not None:
        save(tmp_path / "a.jsonl", rows)
    message = refusal(DataError, {"data": {"path": str(tmp_path / "a.jsonl")}})
    assert re.search(text, message), message


def test_no_preferences_and_a_good_expert_pass(tmp_path):
    assert inspect(ORACLE) is None
    assert inspect(ORACLE | {"order": "random"}, budget=2) is None
    endpoint = {"type": "http", "base_url": "http://127.0.0.1:9/v1", "model": "m", "api_key_env": None}
    assert inspect(ORACLE, oracle=endpoint) is None
    assert inspect(ORACLE, oracle={"type": "replay", "comparisons_path": "pairs.jsonl"}) is None
    dpo = config_of(ORACLE).model_copy(update={"preferences": None})
    assert inspect_preferences(dpo, ModelFacts()) is None


@pytest.mark.parametrize(("order", "least"), [("both", 4), ("random", 2)])
def test_a_budget_too_small_for_the_order_is_refused(order, least):
    if least > 2:  # below two the config itself refuses
        message = refusal(ConfigError, ORACLE | {"order": order}, budget=least - 1)
        assert f'select.budget must be at least {least} when preferences.order is "{order}"' in message
        assert message.endswith(f"got {least - 1}; raise it, or lower rounds")
    assert inspect(ORACLE | {"order": order}, budget=least) is None


def test_one_response_cannot_be_compared():
    assert "generate.k must be at least 2" in refusal(ConfigError, ORACLE, k=1)
    message = refusal(ConfigError, ORACLE | {"pairs_per_prompt": 3}, k=5)
    assert "generate.k must be at least 6" in message and "pairs_per_prompt is 3" in message
    assert message.endswith("got 5; raise it, or lower preferences.pairs_per_prompt")
    assert inspect(ORACLE | {"pairs_per_prompt": 2}, k=4) is None


@pytest.mark.parametrize(
    ("oracle", "text"),
    [
        ({"type": "scripted", "function": "json:dumps"}, "oracle.compare_function is missing"),
        ({"type": "replay", "path": "judgements.jsonl"}, "oracle.comparisons_path is missing"),
    ],
)
def test_an_expert_that_cannot_compare_is_refused(oracle, text):
    assert text in refusal(ConfigError, ORACLE, oracle=oracle)


def test_comparisons_by_another_rubric_than_the_evaluations_are_refused():
    endpoint = {"type": "http", "base_url": "http://127.0.0.1:9/v1", "model": "m", "api_key_env": None}
    own = {"template": "mine.txt"}
    message = refusal(ConfigError, ORACLE, oracle=endpoint, rubric=own)
    assert "rubric.pairwise_template is missing" in message and "rubric.template mine.txt" in message
    assert inspect(ORACLE, oracle=endpoint, rubric=own | {"pairwise_template": "pairs.txt"}) is None
    assert inspect(ORACLE, rubric=own) is None  # a function has its own idea of better


def test_what_only_files_need_is_not_asked_of_experts_and_the_other_way_round(tmp_path):
    cannot_compare = {"type": "scripted", "function": "json:dumps"}
    data = {"path": save(tmp_path / "a.jsonl", PAIRS)}
    assert inspect({"data": data}, oracle=cannot_compare, budget=0, k=1).counts.num_pairs == 3


def test_pairs_without_room_in_the_context_are_refused_and_cut_ones_counted(rlp_tree, tmp_path):
    def prompts(*lengths):
        rows = [{"prompt": "w " * (n - 1) + f"{n}", "chosen": "a b c", "rejected": "d"} for n in lengths]
        return {"preferences": pairs_of(tmp_path, rows), "policy__max_model_len": 20}

    message = refusal_of_run(ConfigError, changed(rlp_tree, **prompts(20, 21, 30)))
    assert "preferences.data.path: a prompt must be shorter than the context of 20 tokens" in message
    assert "none of the 3 pairs" in message and "the shortest has 20" in message and "policy.max_model_len" in message
    plan = plan_of(rlp_tree, **prompts(5, 16, 17, 25))
    assert any("cuts an answer of 2 of 4 pairs" in warning for warning in plan.warnings)
    assert not [w for w in plan_of(rlp_tree, **prompts(5, 16)).warnings if "preferences" in w]
