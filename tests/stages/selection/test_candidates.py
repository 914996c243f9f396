"""Candidates of a later round: the responses that the oracle has not judged yet."""

from rayrl.data.blocks import BlockTable
from rayrl.records import Response, Sampled, from_table, to_table
from rayrl.stages.selection.candidates import unjudged_block


def sampled(prompt, *texts):
    responses = [
        Response(
            id=f"{prompt}-{i}",
            text=text,
            token_ids=[i],
            seed=i,
            policy_version="dpo-1",
            logprob=-1.0,
            finish_reason="stop",
        )
        for i, text in enumerate(texts)
    ]
    return Sampled(prompt_id=prompt, prompt="?", prompt_token_ids=[1], responses=responses)


def test_what_was_judged_is_left_out_by_its_text_and_its_prompt_stays(tmp_path):
    table = BlockTable(str(tmp_path), 1)
    table.write(0, to_table([sampled("p", "a", "b", "c"), sampled("q", "a"), sampled("r", "d")], Sampled))
    left = unjudged_block(frozenset({("p", "b"), ("q", "a"), ("q", "c")}), table, 0)
    assert left.schema == table.read(0).schema
    assert [(row.prompt_id, [(r.id, r.text) for r in row.responses]) for row in from_table(left, Sampled)] == [
        ("p", [("p-0", "a"), ("p-2", "c")]),
        ("q", []),
        ("r", [("r-0", "d")]),
    ]
