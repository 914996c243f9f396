"""Tokenised seed data of supervised fine-tuning, and what the context is too short for."""

import json

import pytest

from rayrl.config import RunConfig
from rayrl.data.tokenizing import load_tokenizer
from rayrl.errors import DataError
from rayrl.runs.run import Run
from rayrl.stages.policy.sft import counted, tokenise
from rayrl.training.sft import collated
from tests.chat_policies import CHATML, GEMMA, assistant, chat_policy, system, user

LIMIT = 64
DROPS_THOUGHTS = (
    "{% for m in messages %}{% set text = m['content'].split('</think>')[-1] if not loop.last else m['content'] %}"
    "<|im_start|>{{ m['role'] }}\n{{ text }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""A template that writes a turn otherwise once others follow it."""
CALL = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "w", "arguments": "{}"}}]}


def run_on(folder, prompts, **seed_data):
    """A run whose policy reads chats of at most 64 tokens; every prompt has a long response."""
    (folder / "seed.jsonl").write_text(
        "".join(json.dumps({"prompt": prompt, "response": "First add water. " * 30}) + "\n" for prompt in prompts)
    )
    tree = {
        "name": "test",
        "run_dir": str(folder),
        "policy": {"path": chat_policy(folder / "policy").path, "max_model_len": LIMIT},
        "pool": {"path": "unused.jsonl"},
        "seed_data": {"path": str(folder / "seed.jsonl")} | seed_data,
        "select": {"budget": 4},
        "oracle": {"type": "scripted", "function": "tests.oracles.length_oracle:judge"},
    }
    return Run(config=RunConfig.model_validate(tree), url=str(folder))


def run_on_chats(folder, chats, *, turns="all", template=CHATML, max_model_len=4096):
    (folder / "seed.jsonl").write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats))
    tree = {
        "name": "test",
        "run_dir": str(folder),
        "policy": {"path": chat_policy(folder / "policy", template).path, "max_model_len": max_model_len},
        "pool": {"path": "unused.jsonl"},
        "seed_data": {"path": str(folder / "seed.jsonl"), "messages_column": "messages"},
        "sft": {"turns": turns},
        "select": {"budget": 4},
        "oracle": {"type": "scripted", "function": "tests.oracles.length_oracle:judge"},
    }
    return Run(config=RunConfig.model_validate(tree), url=str(folder))


def learnt_from(run, examples):
    """For each row of the table the text before what is learnt, and what is learnt, both read from a batch."""
    tokenizer = load_tokenizer(run.config.policy)
    texts = []
    for row in examples.table.read(0).to_pylist():
        (batch,) = collated([row], 4096, packed=True)
        learnt = batch.predicting + 1
        assert batch.input_ids[learnt].tolist() == batch.response_ids[batch.response_mask].tolist()
        texts.append((tokenizer.decode(batch.input_ids[: learnt[0]]), tokenizer.decode(batch.input_ids[learnt])))
    return texts


CHAT = [
    system("Be brief."),
    user("Boil rice."),
    assistant("<think>Rice.</think>Add water."),
    user("And then?"),
    assistant("Wait."),
    user("Thanks."),
]


def test_all_turns_of_the_assistant_are_learnt_from_with_their_ends_and_nothing_else(tmp_path):
    run = run_on_chats(tmp_path, [CHAT])
    first = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nBoil rice.<|im_end|>\n<|im_start|>assistant\n"
    answer = "<think>Rice.</think>Add water.<|im_end|>"
    second = f"{first}{answer}\n<|im_start|>user\nAnd then?<|im_end|>\n<|im_start|>assistant\n"
    assert learnt_from(run, tokenise(run)) == [(first, answer), (second, "Wait.<|im_end|>")]


def test_a_turn_is_learnt_from_as_it_is_generated_though_the_template_drops_its_thoughts_later(tmp_path):
    run = run_on_chats(tmp_path, [CHAT], template=DROPS_THOUGHTS)
    (_, first), (before, second) = learnt_from(run, tokenise(run))
    assert (first, second) == ("<think>Rice.</think>Add water.<|im_end|>", "Wait.<|im_end|>")
    assert "<|im_start|>assistant\nAdd water.<|im_end|>" in before
    assert "<think>" not in before


def test_the_last_turn_alone_is_learnt_from_by_default(tmp_path):
    run = run_on_chats(tmp_path, [CHAT, CHAT[:5]], turns="last")
    examples = tokenise(run)
    assert [learnt for _, learnt in learnt_from(run, examples)] == ["Wait.<|im_end|>"]
    assert (examples.rows.num_empty, counted(examples, "last")) == (1, "1 examples")


def test_turns_that_are_no_examples_are_counted(tmp_path):
    greeted = [assistant("Hello!"), user("Weather?"), CALL, {"role": "tool", "content": "4 C"}, assistant("Cold.")]
    joined = [user("Boil rice."), assistant("Add water."), assistant("Wait."), user("And?"), assistant(" ")]
    run = run_on_chats(tmp_path, [greeted, joined, [user("Hi"), CALL], CHAT[:2]])
    examples = tokenise(run)
    assert [text for _, text in learnt_from(run, examples)] == ["Cold.<|im_end|>", "Add water.\n\nWait.<|im_end|>"]
    rows = examples.rows
    assert (rows.num_rows, rows.num_kept, rows.num_empty, rows.num_skipped_turns) == (4, 2, 2, 3)
    expected = "2 examples, the assistant's turns in 2 chats (3 more are empty, call a tool, or answer nothing)"
    assert counted(examples, "all") == expected


def test_a_template_is_not_asked_to_write_the_chat_before_a_greeting(tmp_path):
    run = run_on_chats(tmp_path, [[assistant("Hello!")]], template=GEMMA)
    with pytest.raises(DataError, match="leaves no row: 1 read, 1 empty"):
        tokenise(run)


def test_later_turns_that_the_context_is_too_short_for_are_left_out(tmp_path):
    chat = [user("Boil rice."), assistant("Add water."), user("Boil rice " * LIMIT), assistant("Wait.")]
    run = run_on_chats(tmp_path, [chat], max_model_len=LIMIT)
    examples = tokenise(run)
    assert (examples.num_examples, examples.cut) == (1, {"num_truncated": 0, "num_too_long": 1})


def test_no_prompt_is_cut_through_the_header_of_the_assistants_turn(tmp_path):
    run = run_on(tmp_path, ["Boil rice.", "Boil rice " * LIMIT, "Mend a chair."])
    examples = tokenise(run)
    assert (examples.num_examples, examples.cut) == (2, {"num_truncated": 2, "num_too_long": 1})
    tokenizer = load_tokenizer(run.config.policy)
    for row in examples.table.read(0).to_pylist():
        assert tokenizer.decode(row["prompt_token_ids"]).endswith("<|im_start|>assistant\n")
        assert len(row["prompt_token_ids"]) + len(row["response_token_ids"]) == LIMIT


def test_bad_rows_are_refused_or_left_out_and_counted(tmp_path):
    refusing, dropping = tmp_path / "refusing", tmp_path / "dropping"
    refusing.mkdir()
    dropping.mkdir()
    with pytest.raises(DataError, match=r"seed.jsonl, row 2: column prompt must be text, got 7 \(int\)"):
        tokenise(run_on(refusing, ["Boil rice.", 7]))
    examples = tokenise(run_on(dropping, ["Boil rice.", 7], on_bad_row="drop"))
    assert (examples.num_examples, examples.rows.bad_rows.num) == (1, 1)


def test_seed_data_whose_prompts_all_fill_the_context_is_refused(tmp_path):
    message = r"leaves no row: 1 read, .* 1 with a prompt that fills the context; .* or raise policy.max_model_len"
    with pytest.raises(DataError, match=message):
        tokenise(run_on(tmp_path, ["Boil rice " * LIMIT]))
