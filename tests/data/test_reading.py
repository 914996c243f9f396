import csv
import gzip
import json
import tracemalloc

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rayrl.config import DataConfig, ReferenceAnswersConfig, SeedDataConfig
from rayrl.data.reading import (
    PromptCounts,
    read_prompts,
    read_reference_answers,
    read_seed_rows,
)
from rayrl.data.rows import read_rows
from rayrl.errors import DataError

ROWS = [{"prompt": "one, two", "score": "1"}, {"prompt": 'say "three"\nfour', "score": "2"}]


def write(path, rows):
    """Write rows in the format the name asks for."""
    match path.name.removesuffix(".gz").rpartition(".")[2]:
        case "jsonl":
            content = "".join(json.dumps(row) + "\n" for row in rows).encode()
        case "json":
            # As json.dump writes it: all in one line.
            content = json.dumps(rows).encode()
        case "csv":
            with path.open("w", newline="") as file:
                writer = csv.DictWriter(file, rows[0])
                writer.writeheader()
                writer.writerows(rows)
            content = path.read_bytes()
        case "parquet":
            pq.write_table(pa.Table.from_pylist(rows), path)
            content = path.read_bytes()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return str(path)


def rows_of(path, split="train"):
    return [row.cells for row in read_rows(str(path), split=split)]


def require_columns(path, needed):
    """Read until the columns are checked."""
    next(read_rows(path, needed)).cells  # noqa: B018


def plain(source):
    return source if isinstance(source, str) else "".join(f"[{m['role']}]{m['content']}" for m in source)


@pytest.mark.parametrize("suffix", ["jsonl", "json", "csv", "parquet"])
@pytest.mark.parametrize("zipped", ["", ".gz"])
def test_every_format_gives_the_same_rows(tmp_path, suffix, zipped):
    path = write(tmp_path / f"pool.{suffix}{zipped}", ROWS)
    assert rows_of(path) == ROWS
    assert rows_of(f"file://{path}") == ROWS


def test_saved_data_sets_with_and_without_splits(tmp_path):
    saved = datasets.Dataset.from_list(ROWS)
    saved.save_to_disk(str(tmp_path / "one"))
    datasets.DatasetDict(train=saved, test=saved.select([1])).save_to_disk(str(tmp_path / "two"))
    assert rows_of(str(tmp_path / "one")) == ROWS
    assert rows_of(str(tmp_path / "two"), "test") == ROWS[1:]
    with pytest.raises(DataError, match="no split dev; the splits there are train, test"):
        rows_of(str(tmp_path / "two"), "dev")


def test_json_lines_named_json_and_a_byte_order_mark(tmp_path):
    (tmp_path / "a.json").write_text('{"prompt": "x"}\n\n{"prompt": "y"}\n')
    assert [row["prompt"] for row in rows_of(tmp_path / "a.json")] == ["x", "y"]
    (tmp_path / "b.csv").write_bytes(b"\xef\xbb\xbfprompt\nx\n")
    assert rows_of(str(tmp_path / "b.csv")) == [{"prompt": "x"}]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"prompt": "x"}\n{"prompt": \n', "a.jsonl, row 2: the line is not JSON"),
        ("a.jsonl", '{"prompt": "x"}\n["y"]\n', "a.jsonl, row 2: it must be a JSON object, got "),
        ("a.json", '[{"prompt": "x"},\n"y"]', r"row 2: it must be a JSON object, got \"y\""),
        ("a.json", '[{"prompt": "x"},\n', "line 2: the file is not JSON: its list is not closed"),
        (
            "a.csv",
            "prompt\nx,y\n",
            r"row 1 \(line 2\): it has more cells than the header, 2 for 1 columns; .* must stand in quotation",
        ),
        ("a.parquet", "no parquet", "cannot be read"),
        ("a.jsonl.gz", "no gzip", "the line is not JSON: .*; got 'no gzip'"),
        ("a.jsonl", "", "is empty: at least one row"),
        ("a.json", "[]", "is empty: at least one row"),
        ("a.txt", "x", "must end in one of .jsonl"),
    ],
)
def test_malformed_files_are_refused(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=message):
        [row.cells for row in read_rows(str(tmp_path / name), ["prompt"])]


def test_a_missing_file_and_a_hub_name_that_cannot_be_reached(tmp_path, monkeypatch):
    with pytest.raises(DataError, match=r"gone.jsonl does not exist"):
        require_columns(str(tmp_path / "gone.jsonl"), ["prompt"])
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(DataError, match=r"someone/something is no local file or folder, .*download the data set"):
        require_columns("someone/something", ["prompt"])


def test_a_missing_column_is_named_with_the_columns_there_are(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"promt": "x", "id": 1}])
    with pytest.raises(DataError, match=r"no column prompt; the columns there are promt, id; did you mean promt\?"):
        require_columns(path, ["prompt"])
    require_columns(path, ["promt", "id"])


def test_a_column_that_only_later_rows_have_counts(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"prompt": "x"}, {"prompt": "y", "score": 1}])
    require_columns(path, ["score"])
    with pytest.raises(DataError, match="no column reward"):
        require_columns(path, ["reward"])


def test_prompts_without_duplicates_and_empty_ones(tmp_path):
    texts = ["x", "y", "x", "", "  ", None, "z"]
    path = write(tmp_path / "a.jsonl", [{"prompt": text} for text in texts])
    counts = PromptCounts()
    prompts = list(read_prompts(DataConfig(path=path), plain, counts))
    assert [prompt.text for prompt in prompts] == ["x", "y", "z"]
    assert len({prompt.id for prompt in prompts}) == 3
    assert counts == PromptCounts(num_rows=7, num_kept=3, num_empty=3, num_duplicate=1)


def test_limit_counts_rows(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"prompt": text} for text in "aabc"])
    assert [p.text for p in read_prompts(DataConfig(path=path, limit=3), plain)] == ["a", "b"]


@pytest.mark.parametrize("suffix", ["jsonl", "parquet", "csv"])
def test_chats_lose_their_last_answer_and_seed_rows_keep_it(tmp_path, suffix):
    chat = [
        {"role": "system", "content": "S"},
        {"role": "user", "content": "first"},
        {"role": "assistant", "content": "A"},
        {"role": "user", "content": "second"},
        {"role": "assistant", "content": "B"},
    ]
    cells = [json.dumps(c) if suffix == "csv" else c for c in (chat, chat[:4], chat[:1])]
    path = write(tmp_path / f"a.{suffix}", [{"messages": cell} for cell in cells])
    counts = PromptCounts()
    (prompt,) = read_prompts(DataConfig(path=path, messages_column="messages"), plain, counts)
    assert prompt.text == "System: S\n\nUser: first\n\nAssistant: A\n\nUser: second"
    assert prompt.rendered == "[system]S[user]first[assistant]A[user]second"
    assert (counts.num_duplicate, counts.num_empty) == (1, 1)
    ((seed_prompt, response),) = read_seed_rows(SeedDataConfig(path=path, messages_column="messages"), plain)
    assert (seed_prompt, response) == (prompt, "B")


@pytest.mark.parametrize(
    ("cell", "message"),
    [
        ({"prompt": 3}, r"row 1: column prompt must be text, got 3 \(int\); write it as text"),
        ({"prompt": [{"role": "user", "content": "x"}]}, "a chat belongs into messages_column"),
    ],
)
def test_a_prompt_of_the_wrong_type_is_refused(tmp_path, cell, message):
    path = write(tmp_path / "a.jsonl", [cell])
    with pytest.raises(DataError, match=message):
        list(read_prompts(DataConfig(path=path), plain))


@pytest.mark.parametrize(
    "chat",
    [
        [{"from": "system", "value": "S"}, {"from": "human", "value": "ask"}, {"from": "gpt", "value": "A"}],
        [{"role": "system", "text": "S"}, {"role": "prompter", "text": "ask"}],
    ],
)
def test_chats_of_a_pool_come_in_the_shapes_that_pairs_do(tmp_path, chat):
    path = write(tmp_path / "a.jsonl", [{"messages": chat}, {"messages": "\n\nHuman: two\n\nAssistant: B"}])
    prompts = list(read_prompts(DataConfig(path=path, messages_column="messages"), plain))
    assert [prompt.rendered for prompt in prompts] == ["[system]S[user]ask", "[user]two"]


@pytest.mark.parametrize("messages", [[{"role": "user"}], ["x"], "[broken", 3])
def test_messages_of_the_wrong_shape_are_refused(tmp_path, messages):
    path = write(tmp_path / "a.jsonl", [{"messages": messages}])
    with pytest.raises(DataError, match="row 1, column messages: "):
        list(read_prompts(DataConfig(path=path, messages_column="messages"), plain))


def test_seed_rows_are_filtered_by_score(tmp_path):
    rows = [("a", "A", 5), ("b", "B", 2.5), ("c", "", 5), ("d", "D", None), ("e", "E", "3")]
    path = write(tmp_path / "a.jsonl", [{"prompt": p, "response": r, "score": s} for p, r, s in rows])
    config = SeedDataConfig(path=path, score_column="score", min_score=3)
    counts = PromptCounts()
    assert [(p.text, r) for p, r in read_seed_rows(config, plain, counts)] == [("a", "A"), ("e", "E")]
    assert counts == PromptCounts(num_rows=5, num_kept=2, num_empty=1, num_below_score=1, num_without_score=1)
    path = write(tmp_path / "b.jsonl", [{"prompt": "a", "response": "A", "score": "high"}])
    with pytest.raises(DataError, match="row 1: column score must be a number, got 'high'"):
        list(read_seed_rows(SeedDataConfig(path=path, score_column="score", min_score=3), plain))


def test_reference_answers(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"prompt": "a", "response": "A"}, {"prompt": "b", "response": " "}])
    assert [(p.text, a) for p, a in read_reference_answers(ReferenceAnswersConfig(path=path), plain)] == [("a", "A")]


@pytest.mark.parametrize("suffix", ["jsonl", "json", "csv", "jsonl.gz", "parquet"])
def test_memory_does_not_grow_with_the_file(tmp_path, suffix):
    def peak(num_rows):
        rows = [{"prompt": f"{i} " + "x" * 1000} for i in range(num_rows)]
        path = write(tmp_path / f"{num_rows}.{suffix}", rows)
        del rows
        tracemalloc.start()
        for _ in read_prompts(DataConfig(path=path), plain):
            pass
        highest = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return highest

    rows_of(write(tmp_path / f"warm.{suffix}", ROWS))
    assert peak(16_000) < peak(4_000) + 4_000_000  # the files differ by 12 MB, the ids seen by 1
