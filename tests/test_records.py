"""Records and tables never drift apart."""

import pickle
from dataclasses import fields, replace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rayrl.records import (
    Checkpoint,
    Comparison,
    Judgement,
    PreferencePair,
    Prompt,
    Response,
    Sampled,
    arrow_schema,
    content_id,
    from_table,
    to_table,
)

PROMPT = Prompt(id="p", text="Wie geht's?", rendered="<s>Wie geht's?")
RESPONSES = [
    Response(
        id=f"p-{i}",
        text=text,
        token_ids=token_ids,
        seed=(1 << 63) - 1,
        policy_version="m1",
        logprob=-1.5 * i,
        finish_reason="stop",
    )
    for i, (text, token_ids) in enumerate([("gut \u2713\n", [3, 4, 2]), ("", [])])
]
SAMPLED = Sampled(prompt_id="p", prompt="Wie geht's?", prompt_token_ids=[1, 5], responses=RESPONSES, num_empty=1)
SILENT = Sampled(prompt_id="q", prompt="?", prompt_token_ids=[], responses=[])
JUDGEMENT = Judgement(
    key="k",
    prompt_id="p",
    response_id="p-0",
    prompt="?",
    response="!",
    oracle="o",
    status="scored",
    score=3.5,
    rationale="fine",
    purpose="label",
    cost_usd=0.01,
)
ABSTENTION = Judgement(
    key="l",
    prompt_id="p",
    response_id="p-1",
    prompt="?",
    response="!",
    oracle="o",
    status="abstained",
    score=None,
    rationale="timed out",
    purpose="evaluate",
    cost_usd=0.0,
)
COMPARISON = Comparison(
    key="m",
    prompt_id="p",
    first_id="p-0",
    second_id="p-1",
    prompt="?",
    first="!",
    second="!!",
    oracle="o",
    status="scored",
    preference="tie",
    rationale="alike",
    purpose="label",
    cost_usd=0.01,
)
PAIR = PreferencePair(
    prompt_id="p",
    prompt="?",
    prompt_token_ids=[1],
    chosen_id="p-0",
    rejected_id="p-1",
    chosen="a",
    rejected="b",
    chosen_token_ids=[3, 2],
    rejected_token_ids=[4, 2],
    chosen_score=4.0,
    rejected_score=1.0,
    chosen_reference_logprob=-3.0,
    rejected_reference_logprob=-2.0,
    source="mixed",
)
TABLES = [
    (Prompt, [PROMPT]),
    (Response, RESPONSES),
    (Sampled, [SAMPLED, SILENT]),
    (Judgement, [JUDGEMENT, ABSTENTION]),
    (Comparison, [COMPARISON, replace(COMPARISON, status="abstained", preference=None)]),
    (PreferencePair, [PAIR]),
    (Checkpoint, [Checkpoint(path="a", version="b")]),
]


@pytest.mark.parametrize(("record", "records"), TABLES)
def test_records_survive_arrow_and_parquet(tmp_path, record, records):
    table = to_table(records, record)
    pq.write_table(table, tmp_path / "part.parquet")
    assert table.schema == arrow_schema(record)
    assert from_table(table, record) == records
    assert from_table(pq.read_table(tmp_path / "part.parquet"), record) == records


@pytest.mark.parametrize(("record", "records"), TABLES)
def test_records_survive_pickle(record, records):
    assert pickle.loads(pickle.dumps(records)) == records


@pytest.mark.parametrize("record", [record for record, _ in TABLES])
def test_an_empty_table_has_every_column(record):
    table = to_table([], record)
    assert table.schema.names == [field.name for field in fields(record)]
    assert from_table(table, record) == []


def test_only_what_may_be_none_is_nullable():
    assert [field.name for field in arrow_schema(Judgement) if field.nullable] == ["score", "cost_usd"]
    assert [field.name for field in arrow_schema(Comparison) if field.nullable] == ["preference", "cost_usd"]
    assert not any(field.nullable for field in arrow_schema(Sampled))
    responses = arrow_schema(Sampled).field("responses").type
    assert not responses.value_field.nullable
    assert [field.name for field in responses.value_type] == [field.name for field in fields(Response)]
    assert arrow_schema(Response).field("token_ids").type == pa.list_(pa.field("item", pa.int64(), nullable=False))


def test_a_question_is_its_ids_and_texts_and_the_rest_is_filled_in_later():
    question = Judgement(prompt_id="p", response_id="p-0", prompt="?", response="!")
    assert (question.status, question.score, question.key, question.oracle, question.purpose) == (
        "asked", None, "", "", ""
    )  # fmt: skip
    answer = replace(question, key="k", oracle="o", status="scored", score=3.5, rationale="fine", purpose="label")
    assert replace(answer, cost_usd=0.01) == JUDGEMENT
    assert question.response_key == JUDGEMENT.response_key == ("p", "!")


def test_a_comparison_is_turned_before_it_is_answered():
    question = Comparison(prompt_id="p", first_id="p-0", second_id="p-1", prompt="?", first="!", second="!!")
    turned = question.turned()
    assert (turned.first_id, turned.first, turned.second_id, turned.second) == ("p-1", "!!", "p-0", "!")
    assert turned.turned() == question
    with pytest.raises(AssertionError, match="one order"):
        COMPARISON.turned()


def test_content_id_separates_its_parts():
    assert content_id("ab", "c") == content_id("ab", "c")
    assert len({content_id("ab", "c"), content_id("a", "bc"), content_id("abc"), content_id("abc", "")}) == 4
    assert len(content_id()) == 16
