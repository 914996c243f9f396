"""Tokenised seed data of supervised fine-tuning, and what the context is too short for."""

import json

import pytest

from rayrl.config import RunConfig
from rayrl.data.tokenizing import load_tokenizer
from rayrl.errors import DataError
from rayrl.runs.run import Run
from rayrl.stages.policy.sft import tokenise
from tests.chat_policies import chat_policy

LIMIT = 64


def run_on(folder, prompts):
    """A run whose policy reads chats of at most 64 tokens; every prompt has a long response."""
    (folder / "seed.jsonl").write_text(
        "".join(json.dumps({"prompt": prompt, "response": "First add water. " * 30}) + "\n" for prompt in prompts)
    )
    tree = {
        "name": "test",
        "run_dir": str(folder),
        "policy": {"path": chat_policy(folder / "policy").path, "max_model_len": LIMIT},
        "pool": {"path": "unused.jsonl"},
        "seed_data": {"path": str(folder / "seed.jsonl")},
        "select": {"budget": 4},
        "oracle": {"type": "scripted", "function": "tests.oracles.length_oracle:judge"},
    }
    return Run(config=RunConfig.model_validate(tree), url=str(folder))


def test_no_prompt_is_cut_through_the_header_of_the_assistants_turn(tmp_path):
    run = run_on(tmp_path, ["Boil rice.", "Boil rice " * LIMIT, "Mend a chair."])
    examples = tokenise(run)
    assert (examples.num_examples, examples.cut) == (2, {"num_truncated": 2, "num_too_long": 1})
    tokenizer = load_tokenizer(run.config.policy)
    for row in examples.table.read(0).to_pylist():
        assert tokenizer.decode(row["prompt_token_ids"]).endswith("<|im_start|>assistant\n")
        assert len(row["prompt_token_ids"]) + len(row["response_token_ids"]) == LIMIT


def test_seed_data_whose_prompts_all_fill_the_context_is_refused(tmp_path):
    message = r"leaves no row: 1 read, .* 1 with a prompt that fills the context; .* or raise policy.max_model_len"
    with pytest.raises(DataError, match=message):
        tokenise(run_on(tmp_path, ["Boil rice " * LIMIT]))
