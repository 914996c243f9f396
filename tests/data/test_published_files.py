"""Files as people have them: each is read with the right values, or refused with its row and what to do."""

import gzip
import json
import tracemalloc

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rayrl.config import DataConfig, PreferenceDataConfig, SeedDataConfig
from rayrl.data import json_rows
from rayrl.data.cells import check_text, number_cell
from rayrl.data.chats import read_chat
from rayrl.data.files import refused_text
from rayrl.data.pairs import PairCounts, read_pairs
from rayrl.data.reading import PromptCounts, Room, read_prompts, read_seed_rows
from rayrl.data.rows import read_rows
from rayrl.errors import DataError
from tests.chat_policies import assistant, user

EGG, RIVER = "How do I boil an egg?", "Name a river."
BOTH = [EGG, RIVER]


def plain(source):
    return source if isinstance(source, str) else json.dumps(source)


def prompts_of(path, counts=None, **settings):
    return [prompt.text for prompt in read_prompts(DataConfig(path=str(path), **settings), plain, counts)]


def saved(folder, name, content):
    (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder / name


def lines(*rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


READ = [
    # CSV: separators, quotation marks, indices, line breaks and encodings
    ("index-of-pandas.csv", f",prompt,response\n0,{EGG},Ten minutes.\n1,{RIVER},The Rhine.\n", {}, BOTH),
    ("semicolons.csv", f"prompt;response\n{EGG};Ten, or eight.\n{RIVER};The Rhine.\n", {}, BOTH),
    ("tabs.csv", f"prompt\tresponse\n{EGG}\tTen minutes.\n", {}, [EGG]),
    ("bars.csv", f"id|prompt\n1|{EGG}\n", {}, [EGG]),
    ("tabs.tsv", f"id\tprompt\n1\tWell, {EGG}\n", {}, [f"Well, {EGG}"]),
    ("excel.csv", f"\ufeffsep=;\r\nid;prompt\r\n1;{EGG}\r\n", {}, [EGG]),
    ("old-mac.csv", f"prompt\r{EGG}\r{RIVER}\r", {}, BOTH),
    ("spaces-in-header.csv", f'id, prompt\n1, {EGG}\n2, "a, b"\n', {}, [EGG, "a, b"]),
    ("doubled-marks.csv", 'id,prompt\n1,"say ""a"", then\n\nb"\n', {}, ['say "a", then\n\nb']),
    ("backslashes.csv", 'id,prompt\n1,"say \\"a\\", then b"\n', {}, ['say "a", then b']),
    (
        "escaped-marks-and-other-backslashes.csv",
        'id,prompt\n1,"Simplify \\frac{1}{2}, say \\"a\\" and \\\\"\n2,Open C:\\temp\\new\n',
        {},
        ['Simplify \\frac{1}{2}, say "a" and \\\\', "Open C:\\temp\\new"],
    ),
    ("blank-lines-first.csv", f"\r\n  \r\nid,prompt\r\n1,{EGG}\r\n", {}, [EGG]),
    ("blank-lines-first.tsv", f"\n\n\tprompt\n0\t{EGG}, or fry\n", {}, [f"{EGG}, or fry"]),
    ("old-mac-semicolons.csv", "prompt\rBoil; or fry?\r", {}, ["Boil; or fry?"]),
    ("marked-utf-16-le.csv", f"\ufeffprompt\n{EGG}\n".encode("utf-16-le"), {"encoding": "utf-16-le"}, [EGG]),
    ("cell-ends-in-backslash.csv", 'id,prompt,x\n1,"C:\\",y\n', {}, ["C:\\"]),
    ("empty-cells-behind.csv", f"prompt,response\n{EGG},x,,\n", {}, [EGG]),
    ("duplicate-of-another-column.csv", f"x,x,prompt\n1,2,{EGG}\n", {}, [EGG]),
    ("upper.CSV", f"prompt\n{EGG}\n", {}, [EGG]),
    ("marked.csv", f"\ufeffprompt\n{EGG}\n", {}, [EGG]),
    (
        "cp1252.csv",
        "prompt\nWas kostet ein Brötchen \u2013 ungefähr?\n".encode("cp1252"),
        {"encoding": "cp1252"},
        ["Was kostet ein Brötchen \u2013 ungefähr?"],
    ),
    ("utf-16.csv", f"prompt\n{EGG}\n{RIVER}\n".encode("utf-16"), {"encoding": "utf-16"}, BOTH),
    ("long-cell.csv", "prompt\n" + "x" * 300_000 + "\n", {}, ["x" * 300_000]),
    # JSON: lines, lists, objects over lines, and lists under one key, under any name
    ("lines.jsonl", lines({"prompt": EGG}, {"prompt": RIVER}), {}, BOTH),
    ("lines.ndjson", lines({"prompt": EGG}, {"prompt": RIVER}), {}, BOTH),
    ("lines.json", lines({"prompt": EGG}, {"prompt": RIVER}), {}, BOTH),
    ("lines.txt", lines({"prompt": EGG}, {"prompt": RIVER}), {}, BOTH),
    ("no-suffix", lines({"prompt": EGG}, {"prompt": RIVER}), {}, BOTH),
    ("list.json", json.dumps([{"prompt": EGG}, {"prompt": RIVER}]), {}, BOTH),
    ("another-key-twice.jsonl", f'{{"x": 1, "x": 2, "prompt": "{EGG}", "y": {{"prompt": 1, "prompt": 2}}}}', {}, [EGG]),
    ("lists-behind-one-another.json", f'[{{"prompt": "{EGG}"}}]\n\n[]\ufeff[{{"prompt": "{RIVER}"}}]\n', {}, BOTH),
    ("lists-of-a-line-each.jsonl", f'[{{"prompt": "{EGG}"}}]\n[{{"prompt": "{RIVER}"}}]\n', {}, BOTH),
    ("list.jsonl", json.dumps([{"prompt": EGG}, {"prompt": RIVER}], indent=2), {}, BOTH),
    ("over-lines.jsonl", "".join(json.dumps({"prompt": p}, indent=2) + "\n" for p in BOTH), {}, BOTH),
    ("under-a-key.json", json.dumps({"version": 1, "data": [{"prompt": EGG}, {"prompt": RIVER}]}, indent=1), {}, BOTH),
    ("under-a-key-in-a-line.json", json.dumps({"data": [{"prompt": EGG}, {"prompt": RIVER}]}), {}, BOTH),
    ("one-object.json", json.dumps({"prompt": EGG}, indent=1), {}, [EGG]),
    ("one-chat.json", json.dumps({"messages": [user(EGG)]}), {"messages_column": "messages"}, [EGG]),
    ("other-line-breaks.jsonl", json.dumps({"prompt": "a\u2028b\x85c"}, ensure_ascii=False), {}, ["a\u2028b\x85c"]),
    ("utf-16.jsonl", lines({"prompt": EGG}).encode("utf-16"), {"encoding": "utf-16"}, [EGG]),
    ("joined-files.jsonl", "\ufeff" + lines({"prompt": EGG}) + "\ufeff" + lines({"prompt": RIVER}), {}, BOTH),
    ("not-a-number.jsonl", lines({"instruction": EGG, "input": float("nan")}), {"prompt_column": "instruction"}, [EGG]),
    # Instructions, and dialogues in one string
    (
        "alpaca.jsonl",
        lines(
            {"instruction": "Sum up.", "input": "A", "output": "x"},
            {"instruction": "Sum up.", "input": "B", "output": "y"},
            {"instruction": RIVER, "input": "", "output": "z"},
        ),
        {"prompt_column": "instruction"},
        ["Sum up.\n\nA", "Sum up.\n\nB", RIVER],
    ),
    (
        "alpaca.csv",
        f"instruction,input\nSum up.,A\n{RIVER},\n",
        {"prompt_column": "instruction"},
        ["Sum up.\n\nA", RIVER],
    ),
    (
        "dolly.jsonl",
        lines({"instruction": "Who?", "context": "Ann.", "response": "Ann"}),
        {"prompt_column": "instruction", "input_column": "context"},
        ["Who?\n\nAnn."],
    ),
    (
        "instruction-alone.jsonl",
        lines({"instruction": "Sum up.", "input": "A"}),
        {"prompt_column": "instruction", "input_column": ""},
        ["Sum up."],
    ),
    ("without-input.jsonl", lines({"instruction": RIVER}), {"prompt_column": "instruction"}, [RIVER]),
    ("hh.jsonl", lines({"text": f"\n\nHuman: {EGG}\n\nAssistant: Ten minutes."}), {"messages_column": "text"}, [EGG]),
    (
        "windows-dialogue.csv",
        'text\r\n"Human: a\r\n\r\nAssistant: b\r\n\r\nHuman: c"\r\n',
        {"messages_column": "text"},
        ["User: a\n\nAssistant: b\n\nUser: c"],
    ),
    (
        "by-fields.jsonl",
        lines({"c": {"from": ["human", "gpt"], "value": [EGG, "Ten minutes."]}}),
        {"messages_column": "c"},
        [EGG],
    ),
    (
        "guanaco.jsonl",
        lines({"text": f"### Human: {EGG}### Assistant: Ten minutes."}),
        {"messages_column": "text"},
        [EGG],
    ),
    (
        "two-turns.jsonl",
        lines({"text": "### Human: a### Assistant: b\n\n### Human: c"}),
        {"messages_column": "text"},
        ["User: a\n\nAssistant: b\n\nUser: c"],
    ),
]


@pytest.mark.parametrize(("name", "content", "settings", "expected"), READ, ids=[case[0] for case in READ])
def test_files_are_read(tmp_path, name, content, settings, expected):
    assert prompts_of(saved(tmp_path, name, content), **settings) == expected


REFUSED = [
    (
        "utf-16.csv",
        f"prompt\n{EGG}\n".encode("utf-16"),
        {},
        r'is UTF-16 and not utf-8; save it as UTF-8, or set enc.* = "utf-16"',
    ),
    ("utf-16.jsonl", lines({"prompt": EGG}).encode("utf-16"), {}, r'is UTF-16 .* encoding = "utf-16"'),
    (
        "cp1252.csv",
        "prompt\nx\nungefähr?\n".encode("cp1252"),
        {},
        r'line 3 is not in the encoding utf-8: .* 0xe4; save .* "cp1252"',
    ),
    ("cp1252.jsonl", json.dumps({"prompt": "é"}, ensure_ascii=False).encode("cp1252"), {}, "line 1 is not in the enc"),
    (
        "no-utf-16.csv",
        "prompt\nab\n",
        {"encoding": "utf-16"},
        "is not in the encoding utf-16: UTF-16 stream does not start",
    ),
    (
        "utf-8-as-ascii.csv",
        "prompt\nä\n",
        {"encoding": "ascii"},
        "is not in the encoding ascii: .*can't decode byte 0xc3",
    ),
    ("short-row.csv", f"id,prompt\n1,{EGG}\n2\n3,{RIVER}\n", {}, r"row 2 \(line 3\): it has fewer cells than the head"),
    ("commas.csv", "prompt\nWell, you\n", {}, r"row 1 \(line 2\): it has more cells than the header, 2 for 1 col.*','"),
    (
        "short-row-alone.csv",
        "id,prompt\n1\n",
        {},
        r"fewer cells .*; write all of its cells, also the empty ones, .*','",
    ),
    ("space-before-mark.csv", 'id,prompt\n1, "a, b"\n', {}, "no space may stand before the quotation mark"),
    ("two-of-a-name.csv", f"prompt,prompt\n{EGG},\n", {}, "has 2 columns named prompt; rename all but one"),
    (
        "two-of-an-optional-name.csv",
        "instruction,input,input\nSum,A,B\n",
        {"prompt_column": "instruction"},
        "has 2 columns named input; rename",
    ),
    ("escaped-and-broken.csv", 'id,prompt\n1,"use \\"a\\""\n2,"b"c\n', {}, "line 3: the row that begins here breaks"),
    (
        "object-behind-a-list.json",
        '[{"prompt": "a"}]\n{"prompt": "b"}\n',
        {},
        "line 2: text follows the end of the list; r",
    ),
    (
        "key-twice.jsonl",
        '{"prompt": "a", "prompt": "b"}\n',
        {},
        "row 1: it has the key prompt twice; remove all but one",
    ),
    (
        "key-twice.json",
        '[{"prompt": "a", "prompt": "b"}]',
        {},
        "row 1: it has the key prompt twice; remove all but one",
    ),
    ("text-behind-a-list.json", '[{"prompt": "a"}] more', {}, "line 1: text follows the end of the list; remove it"),
    (
        "rows-under-a-key.json",
        json.dumps({"data": [{"prompt": "a"}, {"prompt": 3}]}, indent=1),
        {},
        "json, row 2: column prompt must",
    ),
    (
        "one-chat.jsonl",
        lines({"messages": [user("a")]}),
        {"messages_column": "conversations"},
        "no column conversations; the columns there are messages",
    ),
    (
        "texts-as-messages.jsonl",
        lines({"m": EGG}),
        {"messages_column": "m"},
        "a list of messages was expected, .*; a column of plain texts belongs into prompt_column",
    ),
    (
        "unparted.jsonl",
        lines({"m": "Human: a\nAssistant: b"}),
        {"messages_column": "m"},
        "row 1, column m: each turn .* must begin after a blank line, .*; put a blank line before each",
    ),
    (
        "open-mark.csv",
        'prompt\n"How do I boil\nName\nx\n',
        {},
        "line 2: .* begins here .*its quotation mark never closes",
    ),
    ("mark-in-a-cell.csv", 'id,prompt\n1,a\n2,"b"c\n3,d\n', {}, r"line 3: the row that begins here breaks the rules"),
    (
        "misspelt.csv",
        f"id,promt\n1,{EGG}\n",
        {},
        r"no column prompt; the columns there are id, promt; did you mean promt",
    ),
    ("header-alone.csv", "prompt\n", {}, "is empty: at least one row is needed"),
    (
        "repr.csv",
        "messages\n\"[{'role': 'user', 'content': 'a'}]\"\n",
        {"messages_column": "messages"},
        "Python's repr",
    ),
    (
        "by-columns.json",
        json.dumps({"prompt": {"0": EGG, "1": RIVER}}),
        {},
        r"one object of columns, .*orient=\"records\"",
    ),
    ("lists-by-columns.json", json.dumps({"prompt": BOTH}, indent=1), {}, "one object of columns"),
    ("two-lists.json", json.dumps({"a": [{"prompt": EGG}], "b": [{}]}), {}, "several lists, under a, b; write the one"),
    (
        "surrogate.jsonl",
        '{"prompt": "I like \\ud83d cakes"}\n',
        {},
        r"row 1: column prompt holds half a .* \\ud83d at place 7",
    ),
    ("nul.jsonl", '{"prompt": "a\\u0000b"}\n', {}, "row 1: column prompt holds the character NUL at place 1; remove"),
    ("nul.csv", b"id,prompt\n1,a\0b\n", {}, r"row 1 \(line 2\): column prompt holds the character NUL"),
    (
        "surrogate-in-a-chat.jsonl",
        '{"messages": [{"role": "user", "content": "\\ud83d"}]}',
        {"messages_column": "messages"},
        r"row 1: the prompt holds half a character",
    ),
    (
        "number.jsonl",
        lines({"prompt": EGG}, {"prompt": 7}),
        {},
        r"row 2: column prompt must be text, got 7 \(int\); write",
    ),
    ("boolean.jsonl", lines({"prompt": True}), {}, r"row 1: column prompt must be text, got True \(bool\)"),
    (
        "object.jsonl",
        lines({"prompt": {"text": EGG}}, {"prompt": EGG}),
        {},
        "row 1: column prompt must be text, got {'text'",
    ),
    (
        "number-in-input.jsonl",
        lines({"instruction": "a", "input": 3}),
        {"prompt_column": "instruction"},
        "column input must",
    ),
    ("marked.csv", f"\ufeffprompt\n{EGG}\n", {"encoding": "cp1252"}, "mark of UTF-8; leave out encoding, which is cp"),
    (
        "utf-16-as-cp1252.csv",
        f"prompt\n{EGG}\n".encode("utf-16"),
        {"encoding": "cp1252"},
        "is UTF-16 and not cp1252; save it as",
    ),
    ("null-row.jsonl", f"{lines({'prompt': EGG})}null\n", {}, "row 2: it must be a JSON object, got null"),
    (
        "broken-line.jsonl",
        f'{lines({"prompt": EGG})}{{"prompt": \n',
        {},
        "row 2: the line is not JSON: .*; got '{\"prompt\":'",
    ),
    ("broken-first.jsonl", f'{{"prompt": "x"\n{lines({"prompt": EGG})}', {}, "row 1: the line is not JSON"),
    (
        "broken-object.json",
        '[\n{"prompt": "x"},\n{"prompt": x}\n]',
        {},
        "line 3 is not JSON: .*; the value begins at line 3",
    ),
    (
        "deep.jsonl",
        '{"prompt": ' + "[" * 100_000 + "]" * 100_000 + "}\n" + lines({"prompt": "x"}),
        {},
        "nested too deeply",
    ),
    (
        "digits.jsonl",
        '{"prompt": ' + "9" * 5000 + "}\n" + lines({"prompt": "x"}),
        {},
        "row 1: the line is not JSON: .*digits",
    ),
    ("page.jsonl", "<!DOCTYPE html>\n<p>Not found</p>\n", {}, "row 1: the line is not JSON: .*; got '<!DOCTYPE html>'"),
    (
        "pointer.jsonl",
        "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12\n",
        {},
        "is a Git LFS pointer, .*`git lfs pull`",
    ),
    ("pointer.parquet", "version https://git-lfs.github.com/spec/v1\noid sha256:00\n", {}, "is a Git LFS pointer"),
    ("cut.parquet", "PAR1", {}, "cut.parquet cannot be read"),
    ("cut.jsonl.gz", gzip.compress(lines({"prompt": EGG}).encode() * 900)[:60], {}, "cut.jsonl.gz cannot be read"),
    (
        "role.jsonl",
        lines({"c": [{"from": "narrator", "value": "x"}]}),
        {"messages_column": "c"},
        "the role of a message must",
    ),
    ("unknown.txt", "x", {}, r"must end in one of .jsonl, .ndjson, .json, .csv, .tsv, .parquet, .arrow"),
]


@pytest.mark.parametrize(("name", "content", "settings", "message"), REFUSED, ids=[case[0] for case in REFUSED])
def test_files_are_refused_with_row_and_remedy(tmp_path, name, content, settings, message):
    path = saved(tmp_path, name, content)
    with pytest.raises(DataError, match=message) as refusal:
        prompts_of(path, **settings)
    assert str(path) in str(refusal.value)


DROPPED = [
    (
        "lines.jsonl",
        lines({"prompt": EGG}) + '{"prompt": \nnull\n' + lines({"prompt": 3}, {"prompt": RIVER}),
        {},
        3,
        "row 2: the line is not JSON",
    ),
    ("cells.csv", f"id,prompt\n1,{EGG}\n2\n3,a,b\n4,{RIVER}\n", {}, 2, r"row 2 \(line 3\): it has fewer cells"),
    (
        "deep.csv",
        "m\n" + "\n".join([f"Human: {EGG}", "[" * 20_000, "9" * 5_000, f"Human: {RIVER}"]) + "\n",
        {"messages_column": "m"},
        2,
        "a list of messages was expected",
    ),
    (
        "list.json",
        json.dumps([{"prompt": EGG}, 7, {"prompt": "\ud83d"}, {"prompt": RIVER}]),
        {},
        2,
        r"row 2 \(line 1\): it must be",
    ),
    (
        "roles.jsonl",
        lines(*({"c": [{"from": by, "value": p}]} for by, p in (("human", EGG), ("narrator", "x"), ("human", RIVER)))),
        {"messages_column": "c"},
        1,
        "row 2, column c: the role of a message",
    ),
]


@pytest.mark.parametrize(("name", "content", "settings", "num", "first"), DROPPED, ids=[case[0] for case in DROPPED])
def test_bad_rows_are_dropped_and_counted(tmp_path, name, content, settings, num, first):
    path, counts = saved(tmp_path, name, content), PromptCounts()
    assert prompts_of(path, counts, on_bad_row="drop", **settings) == BOTH
    assert (counts.num_rows, counts.num_kept, counts.bad_rows.num) == (num + 2, 2, num)
    with pytest.raises(DataError, match=first):
        raise DataError(counts.bad_rows.first)
    assert counts.bad_rows.in_words().startswith(f"dropped {num} bad rows, the first of them {path}, row 2")
    with pytest.raises(DataError, match='or leave such rows out with on_bad_row = "drop"'):
        prompts_of(path, **settings)


def test_two_lines_that_are_cut_at_the_beginning_are_two_bad_rows(tmp_path):
    path = saved(tmp_path, "a.jsonl", '{"prompt": "x,\n{"prompt": "y"\n' + lines({"prompt": EGG}, {"prompt": RIVER}))
    counts = PromptCounts()
    assert prompts_of(path, counts, on_bad_row="drop") == BOTH
    assert counts.bad_rows.num == 2


def test_an_object_that_is_too_long_is_told_so(tmp_path, monkeypatch):
    monkeypatch.setattr(json_rows, "MAX_VALUE_CHARACTERS", 20_000)
    monkeypatch.setattr(json_rows, "_CHUNK_CHARACTERS", 1_000)
    path = saved(tmp_path, "a.json", json.dumps({"data": [{"prompt": "x" * 100}] * 400}, indent=1))
    with pytest.raises(DataError, match=r"line 1: the value that begins here is longer than 20,000 .*; write each row"):
        prompts_of(path)


def test_a_column_that_comes_late_in_a_json_file_is_there(tmp_path):
    path = saved(tmp_path, "late.jsonl", lines(*[{"id": 1}] * 500, {"prompt": EGG}))
    counts = PromptCounts()
    assert prompts_of(path, counts) == [EGG]
    assert (counts.num_rows, counts.num_empty) == (501, 500)


def test_numbers_are_not_cut_at_the_ends_of_what_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(json_rows, "_CHUNK_CHARACTERS", 10)
    path = saved(tmp_path, "a.json", json.dumps([*range(1_000, 1_100)]))
    found = [row.content for row in read_rows(str(path))]
    assert found == [f"it must be a JSON object, got {number}" for number in range(1_000, 1_100)]


def test_tool_calls_with_arguments_that_cannot_be_parsed_keep_them_as_text():
    calls = [{"name": "f", "arguments": "[" * 30_000}]
    chat = read_chat([user("a"), {"role": "assistant", "content": "b", "tool_calls": calls}], "here")
    assert chat[1]["tool_calls"][0]["function"]["arguments"] == "[" * 30_000
    with pytest.raises(DataError, match="here: a tool call must be"):
        read_chat([{"from": "function_call", "value": "9" * 5_000}], "here")


def test_the_first_bad_byte_of_a_file_of_one_line_is_found_in_pieces(tmp_path):
    path = saved(tmp_path, "a.json", b'\n[{"prompt": "' + "\u00e9".encode() * (1 << 23) + b'\xe9"}]')
    tracemalloc.start()
    try:
        refusal = refused_text(str(path), "utf-8", UnicodeError("x"))
        assert tracemalloc.get_traced_memory()[1] < 1 << 23
    finally:
        tracemalloc.stop()
    assert "line 2 is not in the encoding utf-8: it has the byte 0xe9" in str(refusal)
    path = saved(tmp_path, "b.json", b'[{"prompt": "a"}]\xe9')
    with pytest.raises(DataError, match="line 1 is not in the encoding utf-8: it has the byte 0xe9"):
        prompts_of(path)


def test_prompts_that_are_too_long_are_counted_of_all_with_duplicates(tmp_path):
    path = saved(tmp_path, "a.jsonl", lines({"prompt": "y" * 50}) * 3)
    with pytest.raises(DataError, match="but 3 of 3 are not"):
        list(read_prompts(DataConfig(path=str(path)), plain, None, Room(num_tokens=10, count_tokens=len)))


def test_a_limit_bounds_the_rows_that_are_counted_as_unread(tmp_path):
    pq.write_table(pa.table({"prompt": ["a"] * 50, "system": ["s"] * 50}), tmp_path / "a.parquet")
    counts = PromptCounts()
    assert prompts_of(tmp_path / "a.parquet", counts, limit=2) == ["a"]
    assert counts.unread_columns == {"system": 2}


def test_columns_that_nothing_is_made_of_are_counted(tmp_path):
    rows = [{"prompt": "a", "system": "Be brief.", "history": [], "tools": None}, {"prompt": "b", "input": "c"}]
    whole = [rows[0] | {"input": None}, rows[1] | {"system": None, "history": [], "tools": None}]
    pq.write_table(pa.Table.from_pylist(whole), tmp_path / "a.parquet")
    for path in (saved(tmp_path, "a.jsonl", lines(*rows)), tmp_path / "a.parquet"):
        counts = PromptCounts()
        assert prompts_of(path, counts) == ["a", "b"]
        assert counts.unread_columns == {"system": 1, "input": 1}
    counts = PromptCounts()
    alpaca = saved(tmp_path, "b.jsonl", lines({"instruction": "And in Spanish?", "input": "", "history": [["a", "b"]]}))
    assert prompts_of(alpaca, counts, prompt_column="instruction") == ["And in Spanish?"]
    assert counts.unread_columns == {"history": 1}


def test_words_for_empty_cells_and_whole_dialogues_are_counted(tmp_path):
    counts = PromptCounts()
    assert len(prompts_of(saved(tmp_path, "a.csv", f"prompt\nnan\nNone\nNULL\n{EGG}\n"), counts)) == 4
    assert counts.num_null_words == 3
    counts = PromptCounts()
    prompts_of(saved(tmp_path, "b.jsonl", lines({"prompt": "\n\nHuman: a\n\nAssistant: b"}, {"prompt": "c"})), counts)
    assert counts.num_dialogues == 1
    counts = PromptCounts()
    prompts_of(saved(tmp_path, "c.jsonl", lines({"prompt": json.dumps([user("a"), assistant("b")])})), counts)
    assert counts.num_dialogues == 1


def test_prompts_that_differ_in_white_space_line_breaks_or_composition_are_one(tmp_path):
    texts = [
        "Caf\u00e9 hours?",
        "Cafe\u0301 hours?",
        "Caf\u00e9 hours? ",
        "Caf\u00e9 hours?\r\n",
        "a \r\nb",
        "a\nb",
        "a\n b",
    ]
    counts = PromptCounts()
    path = saved(tmp_path, "a.jsonl", lines(*({"prompt": text} for text in texts)))
    assert prompts_of(path, counts) == [texts[0], texts[4], texts[6]]
    assert counts.num_duplicate == 4
    chats = [{"messages": [user("a"), assistant("b"), user(text)]} for text in ("c", "c ", "d")]
    assert len(prompts_of(saved(tmp_path, "b.jsonl", lines(*chats)), messages_column="messages")) == 2


def test_a_score_that_is_not_a_number_is_counted_apart(tmp_path):
    rows = [("a", float("nan")), ("b", 4), ("c", ""), ("d", 1), ("e", "NaN")]
    path = saved(tmp_path, "a.jsonl", lines(*({"prompt": p, "response": "x", "score": score} for p, score in rows)))
    counts = PromptCounts()
    config = SeedDataConfig(path=str(path), score_column="score", min_score=3)
    assert [prompt.text for prompt, _ in read_seed_rows(config, plain, counts)] == ["b"]
    assert (counts.num_without_score, counts.num_below_score) == (3, 1)


@pytest.mark.parametrize("cell", [True, "4/5", "0_4", "4,5", "high", [4], float("inf"), "inf"])
def test_what_is_no_number_is_refused(cell):
    with pytest.raises(DataError, match="row 3: column score must be a number, got"):
        number_cell(cell, "score", "a.csv, row 3")


@pytest.mark.parametrize(
    ("cell", "number"), [("4", 4), (" -1.5e1 ", -15), (".5", 0.5), (2, 2), (None, None), ("", None)]
)
def test_numbers_are_read(cell, number):
    assert number_cell(cell, "score", "here") == number


@pytest.mark.parametrize("encoding", ["utf8-mac-excel", "base64"])
def test_an_encoding_that_is_none_is_refused(encoding):
    with pytest.raises(ValueError, match=r'must be an encoding of text that Python knows, .*, got "'):
        DataConfig(path="x", encoding=encoding)


def test_text_is_text():
    check_text("plain \U0001f600 \u2028", "the prompt", "here")
    assert read_chat("Human: a\n\nAssistant: b", "here") == [user("a"), assistant("b")]


def test_seed_data_of_alpaca_has_its_input(tmp_path):
    row = {"instruction": "Sum up.", "input": "A fjord is an inlet.", "output": "An inlet."}
    config = SeedDataConfig(
        path=str(saved(tmp_path, "a.jsonl", lines(row))), prompt_column="instruction", response_column="output"
    )
    ((prompt, response),) = read_seed_rows(config, plain)
    assert (prompt.text, response) == ("Sum up.\n\nA fjord is an inlet.", "An inlet.")


def pairs_of(path, **settings):
    counts = PairCounts()
    config = PreferenceDataConfig(path=str(path), **settings)
    return [(p.text, a.text, b.text) for p, a, b in read_pairs(config, plain, counts)], counts


def test_published_pairs(tmp_path):
    ultrafeedback = {
        "instruction": "q",
        "completions": [
            {"response": "bad", "overall_score": 2.0},
            {"response": "good", "overall_score": "7.5"},
            {"response": "unrated", "overall_score": "N/A"},
        ],
    }
    path = saved(tmp_path, "a.jsonl", lines(ultrafeedback, ultrafeedback))
    found, _ = pairs_of(path, prompt_column="instruction", replies_column="completions")
    assert found == [("q", "good", "bad")] * 2
    binarized = {
        "prompt": "q",
        "chosen": [user("q"), assistant("good")],
        "rejected": [user("q"), assistant("bad")],
        "score_chosen": 8.0,
    }
    path = saved(tmp_path, "b.jsonl", lines(binarized, binarized))
    assert pairs_of(path)[0] == pairs_of(path, messages_column="chosen")[0] == [("q", "good", "bad")] * 2
    nectar = {"prompt": "q", "answers": [{"answer": "bad", "rank": 2.0}, {"answer": "good", "rank": 1.0}]}
    path = saved(tmp_path, "c.jsonl", lines(nectar, nectar))
    assert pairs_of(path, replies_column="answers")[0] == [("q", "good", "bad")] * 2


CHATS_AS_TEXT = [
    json.dumps([assistant("good")]),
    json.dumps([{"content": "q", "role": "user"}, {"content": "good", "role": "assistant"}]),
    json.dumps({"from": "gpt", "value": "good"}),
    "\n\nHuman: q\n\nAssistant: good",
]


@pytest.mark.parametrize("cell", CHATS_AS_TEXT)
def test_replies_that_are_chats_written_as_text_are_read_as_chats(tmp_path, cell):
    row = {"prompt": "q", "chosen": cell, "rejected": cell.replace("good", "bad"), "response": cell}
    path = saved(tmp_path, "a.jsonl", lines(row))
    assert pairs_of(path)[0] == [("q", "good", "bad")]
    assert [response for _, response in read_seed_rows(SeedDataConfig(path=str(path)), plain)] == ["good"]


def test_replies_that_are_objects_of_another_kind_are_texts(tmp_path):
    texts = ['{"text": "good"}', '{"from": "Oslo", "to": "Bergen"}', "{'role': 3}", "Human: rights are"]
    path = saved(tmp_path, "a.jsonl", lines(*({"prompt": "q", "chosen": text, "rejected": "x"} for text in texts)))
    assert [chosen for _, chosen, _ in pairs_of(path)[0]] == texts
    path = saved(tmp_path, "b.jsonl", lines({"prompt": "q", "chosen": str([assistant("good")]), "rejected": "x"}))
    with pytest.raises(DataError, match=r"row 1, column chosen: .*Python's repr of a list"):
        pairs_of(path)


def test_columns_beside_pairs_that_are_not_read_are_counted(tmp_path):
    row = {"system": "Answer in French.", "question": "q", "chosen": "oui", "rejected": "yes"}
    _, counts = pairs_of(saved(tmp_path, "a.jsonl", lines(row, row)), prompt_column="question")
    assert counts.unread_columns == {"system": 2}


def test_several_rejected_texts_are_several_pairs(tmp_path):
    path = saved(tmp_path, "a.jsonl", lines({"prompt": "q", "chosen": "x", "rejected": ["y", "z"]}))
    assert pairs_of(path)[0] == [("q", "x", "y"), ("q", "x", "z")]


def test_bad_pairs_are_dropped_and_counted(tmp_path):
    good = {"prompt": "q", "chosen": "x", "rejected": "y"}
    path = saved(tmp_path, "a.jsonl", lines(good, good | {"chosen": 3}, good | {"rejected": "x"}, good) + "nonsense\n")
    found, counts = pairs_of(path, on_bad_row="drop")
    assert (found, counts.num_rows, counts.bad_rows.num) == ([("q", "x", "y")] * 2, 5, 3)
    assert "row 2, column chosen: " in counts.bad_rows.first
    with pytest.raises(DataError, match=r'row 2, column chosen: .*on_bad_row = "drop"'):
        pairs_of(path)
