"""Files found, opened and read: formats, compressions, patterns, folders, and only the columns that are used."""

import bz2
import contextlib
import functools
import gzip
import http.server
import json
import lzma
import threading
import tracemalloc

import datasets
import fsspec
import pyarrow as pa
import pyarrow.feather as feather
import pyarrow.parquet as pq
import pytest

from rayrl.data.reading import PromptCounts
from rayrl.data.rows import read_rows
from rayrl.errors import DataError
from tests.data.test_published_files import BOTH, EGG, RIVER, lines, prompts_of, saved

ROWS = [{"prompt": EGG, "id": 1}, {"prompt": RIVER, "id": 2}]


def zstd(content):
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(content)
    return sink.getvalue().to_pybytes()


COMPRESSED = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress, ".zst": zstd, "": bytes}


def in_format(suffix, folder):
    """ROWS as bytes."""
    table, path = pa.Table.from_pylist(ROWS), folder / "plain"
    match suffix:
        case ".jsonl":
            return lines(*ROWS).encode()
        case ".json":
            return json.dumps(ROWS).encode()
        case ".csv":
            return f"prompt,id\n{EGG},1\n{RIVER},2\n".encode()
        case ".tsv":
            return f"prompt\tid\n{EGG}\t1\n{RIVER}\t2\n".encode()
        case ".parquet":
            pq.write_table(table, path)
        case ".feather":
            feather.write_feather(table, path)
        case ".arrow":
            with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as stream:
                stream.write_table(table)
    return path.read_bytes()


@pytest.mark.parametrize("compression", COMPRESSED)
@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".tsv", ".parquet", ".arrow", ".feather"])
def test_every_format_and_compression_gives_the_same_rows(tmp_path, suffix, compression):
    content = COMPRESSED[compression](in_format(suffix, tmp_path))
    path = saved(tmp_path, f"pool{suffix}{compression}", content)
    assert prompts_of(path) == prompts_of(f"file://{path}") == BOTH
    with pytest.raises(DataError, match=r"no column promt; the columns there are prompt, id; did you mean prompt\?"):
        prompts_of(path, prompt_column="promt")


def test_the_content_tells_a_format_that_the_name_does_not(tmp_path):
    assert prompts_of(saved(tmp_path, "pool.json", in_format(".parquet", tmp_path))) == BOTH
    assert prompts_of(saved(tmp_path, "pool.jsonl", gzip.compress(in_format(".jsonl", tmp_path)))) == BOTH
    assert prompts_of(saved(tmp_path, "pool.jsonl.gz", in_format(".jsonl", tmp_path))) == BOTH


@pytest.fixture
def shards(tmp_path):
    """A folder of three shards, with the files that programs leave beside them."""
    folder = tmp_path / "shards"
    folder.mkdir()
    for number in range(3):
        saved(folder, f"part-{number}.jsonl", lines({"prompt": f"p{number}"}, {"prompt": f"q{number}"}))
    for name in ("_SUCCESS", ".part-0.jsonl.crc", "README.md"):
        saved(folder, name, "x")
    return folder


def test_patterns_and_folders_are_all_their_shards(shards, monkeypatch):
    expected = [f"{letter}{number}" for number in range(3) for letter in "pq"]
    monkeypatch.chdir(shards.parent)
    for path in (
        f"{shards}/part-*.jsonl",
        f"{shards}/part-[0-2].jsonl",
        str(shards),
        f"{shards}/part-?.jsonl",
        f"file://{shards}/part-*.jsonl",
        "shards/part-*.jsonl",
        "shards",
    ):
        assert prompts_of(path) == expected, path
    assert [row.number for row in read_rows(str(shards))] == [1, 2, 3, 4, 5, 6]
    with pytest.raises(DataError, match=r"no file matches .*/x-\*.csv; correct the pattern"):
        prompts_of(f"{shards}/x-*.csv")
    saved(shards, "part-1.jsonl", lines({"prompt": "p1"}, {"prompt": 3}))
    with pytest.raises(DataError, match=r"part-1.jsonl, row 2: column prompt must be text"):
        prompts_of(str(shards))
    saved(shards, "part-2.jsonl", lines({"text": "p1"}))
    with pytest.raises(DataError, match=r"part-2.jsonl has no column prompt"):
        prompts_of(f"{shards}/part-[02].jsonl")
    saved(shards, "other.csv", "prompt\nx\n")
    with pytest.raises(DataError, match=r"files of several formats, csv, json; give a pattern .*shards/\*.csv"):
        prompts_of(str(shards))


def test_a_file_whose_name_is_a_pattern_is_that_file(tmp_path):
    assert prompts_of(saved(tmp_path, "data[1].jsonl", lines({"prompt": EGG}))) == [EGG]


def test_folders_of_a_hub_data_set_have_its_splits(tmp_path):
    (tmp_path / "data").mkdir()
    for name, text in (("train-00000-of-00002", "a"), ("train-00001-of-00002", "b"), ("test-00000-of-00001", "c")):
        pq.write_table(pa.table({"prompt": [text]}), tmp_path / "data" / f"{name}.parquet")
    saved(tmp_path, "README.md", "x")
    assert prompts_of(tmp_path) == ["a", "b"]
    assert prompts_of(tmp_path, split="test") == ["c"]
    with pytest.raises(DataError, match="has no split dev; the splits there are train, test"):
        prompts_of(tmp_path, split="dev")
    with pytest.raises(DataError, match="holds no file of data and was not written by save_to_disk"):
        (tmp_path / "empty").mkdir()
        prompts_of(tmp_path / "empty")


@pytest.mark.parametrize(("train", "test"), [("train", "test"), ("train/x", "test/x"), ("my_train", "my_test")])
def test_folders_with_files_of_several_splits_have_them(tmp_path, train, test):
    for name, prompt in ((train, EGG), (test, RIVER)):
        path = tmp_path / f"{name}.jsonl"
        path.parent.mkdir(exist_ok=True)
        path.write_text(lines({"prompt": prompt}))
    assert prompts_of(tmp_path) == [EGG]
    assert prompts_of(tmp_path, split="test") == [RIVER]


CARD = """---
configs:
- config_name: main
  data_files: main/*
- config_name: socratic
  data_files: socratic/*
---
"""


def test_a_folder_of_several_configurations_is_refused_with_a_pattern(tmp_path):
    for name in ("main", "socratic"):
        (tmp_path / name).mkdir()
        saved(tmp_path / name, "rows.jsonl", lines({"prompt": name}))
    saved(tmp_path, "README.md", CARD)
    remote = fsspec.filesystem("memory")
    remote.put(str(tmp_path), "/configurations", recursive=True)
    for path in (str(tmp_path), f"file://{tmp_path}", "memory://configurations"):
        with pytest.raises(DataError, match=r"several configurations of a data set, main, socratic; .*/main/\*"):
            prompts_of(path)
    assert prompts_of(f"{tmp_path}/main/*") == prompts_of("memory://configurations/main/*") == ["main"]
    remote.rm("/configurations", recursive=True)
    for card in (
        "---\nconfigs: [\n---\n",
        "---\nconfigs: 3\n---\n",
        "---\nconfigs: [x]\n---\n",
        "---\n- x\n---\n",
        "\xff",
    ):
        saved(tmp_path, "README.md", card.encode("latin-1"))
        assert len(prompts_of(tmp_path)) == 2


def test_a_folder_with_the_name_of_a_file_is_a_folder(tmp_path):
    (tmp_path / "out.parquet").mkdir()
    pq.write_table(pa.table({"prompt": [EGG]}), tmp_path / "out.parquet" / "part-0.parquet")
    for path in (f"{tmp_path}/out.parquet", f"file://{tmp_path}/out.parquet", f"file://{tmp_path}/out.parquet/"):
        assert prompts_of(path) == [EGG]


class QuietServer(http.server.SimpleHTTPRequestHandler):
    """A web server that gives whole files alone."""

    def log_message(self, *arguments):
        pass

    def copyfile(self, source, outputfile):
        with contextlib.suppress(ConnectionError):  # a reader may close before the end
            super().copyfile(source, outputfile)


@pytest.fixture
def served(tmp_path):
    """(folder, address of the folder)."""
    handler = functools.partial(QuietServer, directory=str(tmp_path))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield tmp_path, f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def test_large_texts_of_a_web_server_without_parts_are_read_and_other_files_refused(served):
    folder, address = served
    num_rows = 7 << 10
    saved(folder, "large.jsonl", lines(*({"prompt": f"{n} " + "x" * 1000} for n in range(num_rows))))
    saved(folder, "small.jsonl.gz", gzip.compress(lines({"prompt": EGG}).encode()))
    assert sum(1 for _ in read_rows(f"{address}/large.jsonl", ["prompt"])) == num_rows
    assert prompts_of(f"{address}/small.jsonl.gz") == [EGG]
    texts = pa.array([f"{n} " + "x" * 1000 for n in range(num_rows)])
    pq.write_table(pa.table({"prompt": texts}), folder / "large.parquet", compression="none", use_dictionary=False)
    saved(folder, "parquet.jsonl", (folder / "large.parquet").read_bytes())
    for name in ("large.parquet", "parquet.jsonl"):
        with pytest.raises(DataError, match=r"needs a server that gives parts of a file, .*; download it first"):
            prompts_of(f"{address}/{name}")


def test_an_address_with_a_query_has_the_format_of_its_path():
    with pytest.raises(DataError, match=r"data.jsonl\?download=true (does not exist|cannot be)"):
        prompts_of("http://127.0.0.1:9/data.jsonl?download=true")


def table_with_image(num_rows, num_bytes):
    images = pa.array([bytes(num_bytes)] * num_rows)
    return pa.table({"prompt": [f"p{n}" for n in range(num_rows)], "image": images, "tools": [[]] * num_rows})


@pytest.mark.parametrize("kind", ["parquet", "arrow", "saved"])
def test_only_the_columns_that_are_used_are_read(tmp_path, kind):
    table = table_with_image(64, 1 << 20)
    path = tmp_path / f"wide.{kind}"
    if kind == "parquet":
        pq.write_table(table, path, row_group_size=64, compression="none", use_dictionary=False)
    elif kind == "arrow":
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, table.schema) as file:
            file.write_table(table)
    else:
        datasets.Dataset(table).save_to_disk(str(path))
    del table
    counts = PromptCounts()
    measured = pa.proxy_memory_pool(pa.default_memory_pool())
    before = pa.default_memory_pool()
    pa.set_memory_pool(measured)
    tracemalloc.start()
    try:
        assert len(prompts_of(path, counts)) == 64
        of_python = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
        pa.set_memory_pool(before)
    assert (measured.max_memory() or 0) + of_python < 8 << 20
    # The images are noticed all the same; lists of tools without a tool are nothing.
    assert counts.unread_columns == {"image": 64}


def test_a_date_after_the_year_9999_harms_nothing_that_is_not_read(tmp_path):
    far = pa.array([300_000_000_000_000] * 2, pa.timestamp("ms"))
    pq.write_table(pa.table({"prompt": BOTH, "at": far}), tmp_path / "far.parquet")
    assert prompts_of(tmp_path / "far.parquet") == BOTH
    with pytest.raises(DataError, match=r"far.parquet, row 1: column at holds a timestamp\[ms\] that cannot be read"):
        prompts_of(tmp_path / "far.parquet", prompt_column="at")


def test_two_columns_of_a_name_in_parquet_are_refused_if_used(tmp_path):
    table = pa.table([pa.array(BOTH), pa.array(BOTH), pa.array(BOTH)], names=["x", "x", "prompt"])
    pq.write_table(table, tmp_path / "a.parquet")
    assert prompts_of(tmp_path / "a.parquet") == BOTH
    with pytest.raises(DataError, match="has 2 columns named x"):
        prompts_of(tmp_path / "a.parquet", prompt_column="x")


def test_text_of_parquet_that_is_no_utf_8_is_refused_with_its_row(tmp_path):
    broken = pa.array([b"ok", b"\xff"], pa.binary()).view(pa.string())
    pq.write_table(pa.table({"prompt": broken}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match="row 2: column prompt holds a string that cannot be read"):
        prompts_of(tmp_path / "a.parquet")
    counts = PromptCounts()
    assert prompts_of(tmp_path / "a.parquet", counts, on_bad_row="drop") == ["ok"]
    assert counts.bad_rows.num == 1


def test_large_json_lists_stream_over_the_ends_of_what_is_read(tmp_path):
    rows = [{"prompt": f"{n} " + "x" * (n % 97) + '"\\é', "n": [n, {"deep": [n]}]} for n in range(30_000)]
    path = saved(tmp_path, "a.json", json.dumps(rows, ensure_ascii=False))
    assert [row.cells for row in read_rows(str(path))] == rows
    path = saved(tmp_path, "b.json", json.dumps(rows[:3_000], indent=3))
    found = list(read_rows(str(path)))
    assert [row.cells for row in found] == rows[:3_000]
    assert found[1].where == f"{path}, row 2 (line 13)"


def test_a_filesystem_that_refuses_is_named(tmp_path, monkeypatch):
    for path in ("nonsense://bucket/pool.jsonl", "nonsense://bucket/*.jsonl", "nonsense://bucket/folder"):
        with pytest.raises(DataError, match=r"nonsense://bucket/\S+ cannot be opened: ValueError: Protocol not known"):
            prompts_of(path)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("Dataset scripts are no longer supported, but found x.py"),
        datasets.exceptions.DatasetGenerationError("An error occurred while generating the dataset"),
        TypeError("unexpected"),
    ],
)
def test_whatever_the_hub_raises_is_a_refusal(monkeypatch, error):
    def load_dataset(*arguments, **settings):
        raise error

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    error.__cause__ = ValueError("row 7 of a.json")
    with pytest.raises(
        DataError, match=r"user/name is no local .*from the hub failed .*: row 7 of a.json\); correct the"
    ):
        prompts_of("user/name")


def test_a_hub_data_set_is_read_by_configuration_split_and_column(monkeypatch):
    asked = []

    def load_dataset(name, configuration, *, split):
        asked.append((name, configuration, split))
        return datasets.Dataset.from_list(ROWS)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert prompts_of("user/name:config", split="test[:2]") == prompts_of("name") == BOTH
    assert asked == [("user/name", "config", "test[:2]"), ("name", None, "train")]
    with pytest.raises(DataError, match="user/name has no column promt; the columns there are prompt, id"):
        prompts_of("user/name", prompt_column="promt")
