"""A table as the oracle: every format gives the same answers, and what is not in the table is not invented."""

import asyncio
import gzip
import json

import pyarrow as pa
import pyarrow.parquet as parquet
import pytest

from rayrl.config import ReplayOracleConfig, RubricConfig
from rayrl.errors import DataError
from rayrl.models.judge_prompt import load_rubric
from rayrl.oracles.build import build_oracle

RUBRIC = load_rubric(RubricConfig())
ROWS = [
    {"prompt": "p1", "response": "one\nline\u2028two", "score": 4, "why": "good, short"},
    {"prompt": "p1", "response": "42", "score": 1.5, "why": ""},
    {"prompt": "p1", "response": "42", "score": 5.0, "why": "a second opinion"},
    {"prompt": "p2", "response": "42", "score": None, "why": "no score"},
    {"prompt": "p2", "response": "high", "score": 7, "why": "another scale"},
]


def as_csv(rows):
    quoted = [",".join('"' + str("" if c is None else c).replace('"', '""') + '"' for c in r.values()) for r in rows]
    return "\n".join([",".join(rows[0]), *quoted])


def write(folder, name, rows):
    path = folder / name
    plain = folder / name.removesuffix(".gz")
    if ".parquet" in name:
        parquet.write_table(pa.Table.from_pylist(rows), plain)
    elif ".jsonl" in name:
        plain.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n\n")
    elif ".json" in name:
        plain.write_text(json.dumps(rows))
    else:
        plain.write_text(as_csv(rows))
    if name.endswith(".gz"):
        path.write_bytes(gzip.compress(plain.read_bytes()))
    return str(path)


def oracle_for(path, **settings):
    return build_oracle(ReplayOracleConfig(path=path, **settings), RUBRIC)


def ask(oracle, prompt, response):
    return asyncio.run(oracle.judge(prompt, response))


@pytest.mark.parametrize(
    "name", ["t.jsonl", "t.jsonl.gz", "t.json", "t.json.gz", "t.csv", "t.csv.gz", "t.parquet", "t.parquet.gz"]
)
def test_every_format_gives_the_same_answers(tmp_path, name):
    oracle = oracle_for(write(tmp_path, name, ROWS), rationale_column="why")
    first = ask(oracle, "p1", "one\nline\u2028two")
    assert (first.score, first.rationale, first.billed, first.cost_usd) == (4.0, "good, short", True, 0.0)
    assert ask(oracle, "p1", "42").score == 1.5  # the first of two opinions
    for prompt, response in (("p2", "42"), ("p2", "high"), ("p2", "never judged"), ("p1", "high")):
        verdict = ask(oracle, prompt, response)
        assert verdict.score is None and not verdict.billed and verdict.rationale


def test_on_any_filesystem(tmp_path):
    path = write(tmp_path, "t.jsonl", ROWS)
    assert ask(oracle_for(f"file://{path}"), "p1", "42").score == 1.5


def test_columns_are_configurable(tmp_path):
    rows = [{"instruction": "i", "output": "o", "rating": 2}]
    oracle = oracle_for(
        write(tmp_path, "t.jsonl", rows),
        prompt_column="instruction",
        response_column="output",
        score_column="rating",
    )
    assert ask(oracle, "i", "o").score == 2.0


def test_missing_column_lists_the_columns_there_are(tmp_path):
    with pytest.raises(
        DataError,
        match=r"oracle.path: .*t.csv has no column rating; the columns there are prompt, response, score, why",
    ):
        oracle_for(write(tmp_path, "t.csv", ROWS), score_column="rating")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("t.jsonl", b"{", "line 1 is not JSON"),
        ("t.json", b"nonsense", "row 1: the line is not JSON"),
        ("t.parquet", b"PAR1", "cannot be read"),
        ("t.jsonl.gz", b"\x1f\x8bnot gzip", "cannot be read"),
        ("t.csv", b"\xff", "not in the encoding utf-8"),
    ],
)
def test_unreadable_file_is_refused(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=f"oracle.path: .*{message}"):
        oracle_for(str(tmp_path / name))


def test_missing_empty_and_unknown_files_are_refused(tmp_path):
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "t.xml").write_text("<a/>")
    for name, text in (("nowhere.jsonl", "nowhere"), ("empty.jsonl", "is empty"), ("t.xml", "must end in")):
        with pytest.raises(DataError, match=text):
            oracle_for(str(tmp_path / name))


LINE = {"prompt": "What is a fjord?", "response": "A sea inlet.", "score": 4}


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("marked.csv", "\ufeffprompt,response,score\nWhat is a fjord?,A sea inlet.,4\n"),
        ("semicolons.csv", "prompt;response;score\nWhat is a fjord?;A sea inlet.;4\n"),
        ("lines.json", json.dumps(LINE) + "\n" + json.dumps(LINE | {"response": "b"}) + "\n"),
        ("lines.ndjson", json.dumps(LINE)),
        ("one-object.json", json.dumps(LINE)),
        ("line-breaks.jsonl", json.dumps(LINE | {"prompt": "What is a fjord?\r\n"})),
        ("trailing-space.jsonl", json.dumps(LINE | {"response": "A sea inlet. "})),
        ("chat.jsonl", json.dumps(LINE | {"prompt": [{"role": "user", "content": "What is a fjord?"}]})),
    ],
)
def test_tables_as_people_have_them(tmp_path, name, content):
    (tmp_path / name).write_text(content)
    assert ask(oracle_for(str(tmp_path / name)), "What is a fjord?", "A sea inlet.").score == 4


@pytest.mark.parametrize("score", ["4/5", "0_4", True, "high", [4]])
def test_a_score_that_is_no_number_is_refused_with_its_row(tmp_path, score):
    path = write(tmp_path, "t.jsonl", [LINE, LINE | {"response": "b", "score": score}])
    with pytest.raises(DataError, match=r"oracle.path: .*t.jsonl, row 2: column score must be a number, got"):
        oracle_for(path)


def test_a_table_in_another_encoding(tmp_path):
    (tmp_path / "t.csv").write_bytes("prompt,response,score\nFähre?,Ja.,4\n".encode("cp1252"))
    with pytest.raises(DataError, match=r"line 2 is not in the encoding utf-8.*encoding = \"cp1252\""):
        oracle_for(str(tmp_path / "t.csv"))
    assert ask(oracle_for(str(tmp_path / "t.csv"), encoding="cp1252"), "Fähre?", "Ja.").score == 4


def test_a_row_that_is_none_is_refused(tmp_path):
    (tmp_path / "t.jsonl").write_text(json.dumps(LINE) + "\nnull\n")
    with pytest.raises(DataError, match="row 2: it must be a JSON object, got null"):
        oracle_for(str(tmp_path / "t.jsonl"))


def test_a_table_in_several_files_is_one_and_another_content_is_another_oracle(tmp_path):
    for number, row in enumerate((LINE, LINE | {"response": "b", "score": 2})):
        write(tmp_path, f"t-{number}.jsonl", [row])
    oracle = oracle_for(f"{tmp_path}/t-*.jsonl")
    assert [ask(oracle, "What is a fjord?", response).score for response in ("A sea inlet.", "b")] == [4, 2]
    write(tmp_path, "t-1.jsonl", [LINE | {"response": "b", "score": 3}])
    assert oracle_for(f"{tmp_path}/t-*.jsonl").name != oracle.name
