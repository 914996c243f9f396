"""Pairs in every shape in which they are published, and what is no pair."""

import csv
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rayrl.config import PreferenceDataConfig
from rayrl.data.chats import read_chat
from rayrl.data.pairs import PairCounts, pair_columns, read_pairs
from rayrl.errors import DataError
from rayrl.records import content_id


def plain(source):
    return source if isinstance(source, str) else "".join(f"[{m['role']}]{m['content']}" for m in source)


def write(path, rows):
    match path.suffix:
        case ".csv":
            with path.open("w", newline="") as file:
                writer = csv.DictWriter(file, rows[0])
                writer.writeheader()
                writer.writerows(rows)
        case ".parquet":
            pq.write_table(pa.Table.from_pylist(rows), path)
        case _:
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def read(tmp_path, rows, suffix="jsonl", **settings):
    """(prompt as rendered, chosen, rejected) of every pair, and the counts."""
    config = PreferenceDataConfig(path=write(tmp_path / f"pairs.{suffix}", rows), **settings)
    counts = PairCounts()
    pairs = list(read_pairs(config, plain, counts))
    assert counts.num_pairs == len(pairs) and counts.prompt_ids == {prompt.id for prompt, _, _ in pairs}
    return [(prompt.rendered, chosen.text, rejected.text) for prompt, chosen, rejected in pairs], counts


def message(role, text):
    return {"role": role, "content": text}


@pytest.mark.parametrize("suffix", ["jsonl", "csv", "parquet"])
def test_plain_columns(tmp_path, suffix):
    rows = [{"prompt": "p", "chosen": "good", "rejected": "bad"}, {"prompt": "q", "chosen": "x, y", "rejected": "z"}]
    pairs, counts = read(tmp_path, rows, suffix)
    assert pairs == [("p", "good", "bad"), ("q", "x, y", "z")]
    assert (counts.num_rows, counts.num_unusable) == (2, 0)


def test_ids_say_where_a_pair_comes_from_and_prompts_are_those_of_the_pool(tmp_path):
    rows = [{"prompt": "p", "chosen": "a", "rejected": "b"}] * 2
    config = PreferenceDataConfig(path=write(tmp_path / "a.jsonl", rows))
    found = list(read_pairs(config, plain, PairCounts()))
    assert [(c.id, r.id) for _, c, r in found] == [("data-1-0", "data-1-1"), ("data-2-0", "data-2-1")]
    assert {prompt.id for prompt, _, _ in found} == {content_id("p")}


CHAT = [message("system", "S"), message("user", "u1"), message("assistant", "a1"), message("user", "u2")]
SHAREGPT = [
    {"from": "system", "value": "S"},
    {"from": "human", "value": "u1"},
    {"from": "gpt", "value": "a1"},
    {"from": "human", "value": "u2"},
]
OASST = [{"role": "system", "text": "S"}, {"role": "prompter", "text": "u1"}, {"role": "assistant", "text": "a1"}]
OASST += [{"role": "prompter", "text": "u2"}]


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
@pytest.mark.parametrize(
    ("chat", "chosen", "rejected"),
    [
        (CHAT, "good", "bad"),
        (CHAT, message("assistant", "good"), message("assistant", "bad")),
        (CHAT, [message("assistant", "good")], [message("assistant", "bad")]),
        (CHAT, [*CHAT, message("assistant", "good")], [*CHAT, message("assistant", "bad"), message("user", "thanks")]),
        (SHAREGPT, {"from": "gpt", "value": "good"}, {"from": "gpt", "value": "bad"}),
        (OASST, {"text": "good"}, {"text": "bad"}),
        ([*CHAT, message("assistant", "an old answer")], "good", "bad"),
    ],
)
def test_chats(tmp_path, chat, chosen, rejected, suffix):
    rows = [{"conversations": chat, "chosen": chosen, "rejected": rejected}]
    pairs, _ = read(tmp_path, rows, suffix, messages_column="conversations")
    assert pairs == [("[system]S[user]u1[assistant]a1[user]u2", "good", "bad")]


def test_messages_in_csv(tmp_path):
    rows = [{"chat": json.dumps(CHAT[1:2]), "chosen": "good", "rejected": "bad"}]
    assert read(tmp_path, rows, "csv", messages_column="chat")[0] == [("[user]u1", "good", "bad")]


HH = "\n\nHuman: u1\n\nAssistant: a1\n\nHuman: u2 Human: x\n\nAssistant:"


@pytest.mark.parametrize(
    ("chosen", "rejected"),
    [
        (f"{HH} good", f"{HH} bad"),
        ([*CHAT[1:3], message("user", "u2 Human: x"), message("assistant", "good")],
         [*CHAT[1:3], message("user", "u2 Human: x"), message("assistant", "bad")]),
    ],
)  # fmt: skip
def test_whole_chats_on_both_sides_hold_the_prompt_too(tmp_path, chosen, rejected):
    pairs, _ = read(tmp_path, [{"chosen": chosen, "rejected": rejected}], messages_column="chosen")
    assert pairs == [("[user]u1[assistant]a1[user]u2 Human: x", "good", "bad")]


def test_whole_chats_that_part_earlier_make_no_pair(tmp_path):
    rows = [
        {"chosen": f"{HH} good", "rejected": "\n\nHuman: another\n\nAssistant: bad"},
        {"chosen": f"{HH} good", "rejected": f"{HH}"},
        {"chosen": f"{HH} good", "rejected": f"{HH} bad"},
    ]
    pairs, counts = read(tmp_path, rows, messages_column="rejected")
    assert len(pairs) == 1
    assert (counts.num_rows, counts.num_other_prompt, counts.num_unusable) == (3, 1, 1)


def test_whole_chats_that_end_without_an_answer_are_counted(tmp_path):
    rows = [
        {"chosen": "\n\nHuman: u1", "rejected": "\n\nHuman: u1\n\nAssistant: a"},
        {"chosen": "\n\nHuman: u1\n\nAssistant: a\n\nHuman: u2", "rejected": "\n\nHuman: u1\n\nAssistant: b"},
        {"chosen": f"{HH} good", "rejected": f"{HH} bad"},
    ]
    pairs, counts = read(tmp_path, rows, messages_column="chosen")
    assert len(pairs) == 1
    assert (counts.num_rows, counts.num_unusable, counts.num_other_prompt) == (3, 1, 1)


def test_ranked_replies_make_all_ordered_pairs(tmp_path):
    replies = [("c", 2), ("a", 0), ("b", 1), ("b2", 1), ("unranked", None)]
    rows = [
        {"prompt": "p", "replies": [{"text": text, "rank": rank, "synthetic": True} for text, rank in replies]},
        {"prompt": "q", "replies": [{"text": "x", "rank": 1}, {"text": "y", "rank": 1}]},
        {"prompt": "r", "replies": [{"text": "x", "rank": 0}, {"text": "y", "rank": None}]},
        {"prompt": "s", "replies": [{"text": "x", "rank": 0}, {"text": " ", "rank": 1}]},
        {"prompt": "t", "replies": None},
    ]
    pairs, counts = read(tmp_path, rows, replies_column="replies")
    assert sorted(pairs) == [
        ("p", "a", "b"), ("p", "a", "b2"), ("p", "a", "c"), ("p", "b", "c"), ("p", "b2", "c")
    ]  # fmt: skip
    assert (counts.num_rows, counts.num_tied, counts.num_unusable) == (5, 1, 3)


def test_rows_that_lack_something_are_counted(tmp_path):
    texts = [("", "a", "b"), (None, "a", "b"), ("p", "", "b"), ("p", "a", " "), ("p", None, "b"), ("p", "a", "b")]
    pairs, counts = read(tmp_path, [{"prompt": p, "chosen": c, "rejected": r} for p, c, r in texts])
    assert pairs == [("p", "a", "b")]
    assert (counts.num_rows, counts.num_unusable) == (6, 5)


def test_limit_counts_rows(tmp_path):
    rows = [{"prompt": p, "chosen": "a", "rejected": "b"} for p in ("", "p", "q", "r")]
    assert [prompt for prompt, _, _ in read(tmp_path, rows, limit=3)[0]] == ["p", "q"]


def test_a_chosen_answer_equal_to_the_rejected_one_is_refused_with_its_row(tmp_path):
    same = {"prompt": "p", "chosen": "same", "rejected": "same\n"}
    rows = [{"prompt": "p", "chosen": "a", "rejected": "b"}, same, same]
    with pytest.raises(DataError, match=r"must differ, and 2 pairs do not \(row 2, 3\); remove those rows"):
        read(tmp_path, rows)
    with pytest.raises(DataError, match=r"9 pairs do not \(row 1, 2, 3, 4, 5 \.\.\.\)"):
        read(tmp_path, [same] * 9)
    replies = [{"text": "x", "rank": n} for n in range(3)]
    _, counts = read(tmp_path, [{"prompt": "p", "replies": replies}], replies_column="replies", on_bad_row="drop")
    assert counts.bad_rows.num == 1
    with pytest.raises(DataError, match=r"3 pairs do not \(row 1\)"):
        read(tmp_path, [{"prompt": "p", "replies": replies}], replies_column="replies")


@pytest.mark.parametrize(
    ("row", "settings", "text"),
    [
        (
            {"prompt": "p", "chosen": 3, "rejected": "b"},
            {},
            "row 1, column chosen: a list of messages was expected, got '3'",
        ),
        ({"prompt": [message("user", "p")], "chosen": "a", "rejected": "b"}, {}, "belongs into messages_column"),
        (
            {"prompt": "p", "chosen": [message("user", "a")], "rejected": "b"},
            {},
            "column chosen: an assistant message is needed",
        ),
        (
            {"prompt": "p", "chosen": [{"role": "assistant"}], "rejected": "b"},
            {},
            r"row 1, column \w+: a message must be",
        ),
        ({"prompt": "p", "replies": ["x"]}, {"replies_column": "replies"}, r"row 1, column \w+: a message must be"),
        (
            {"prompt": "p", "replies": [{"text": "x", "rank": "1st"}]},
            {"replies_column": "replies"},
            "rank must be a num",
        ),
        (
            {"prompt": "p", "replies": [{"text": "x", "rank": 10**400}]},
            {"replies_column": "replies"},
            "row 1, column replies: column rank must be a number",
        ),
        (
            {"prompt": "p", "replies": [{"text": "x", "rank": 0}, {"text": "y", "score": 9.0}]},
            {"replies_column": "replies"},
            "row 1, column replies: some replies have a rank and others only a score, .*; give all of them ranks, or",
        ),
        ({"prompt": "p", "chosen": "a"}, {}, "has no column rejected"),
        ({"prompt": "p", "chosen": "a", "rejected": "b"}, {"replies_column": "x"}, "has no column x"),
        ({"chat": "no chat", "chosen": "a", "rejected": "b"}, {"messages_column": "chat"}, "a list of messages was"),
    ],
)
def test_rows_of_the_wrong_shape_are_refused(tmp_path, row, settings, text):
    with pytest.raises(DataError, match=text):
        read(tmp_path, [row], **settings)


def test_columns_asked_for():
    config = PreferenceDataConfig(path="x")
    assert pair_columns(config) == ["prompt", "chosen", "rejected"]
    assert pair_columns(config.model_copy(update={"messages_column": "chosen"})) == ["chosen", "rejected"]
    assert pair_columns(config.model_copy(update={"replies_column": "r"})) == ["prompt", "r"]


def test_a_dialogue_keeps_what_its_turns_say():
    chat = read_chat("\n\nHuman: one\n\ntwo Assistant: three\n\nAssistant:four", "here")
    assert chat == [message("user", "one\n\ntwo Assistant: three"), message("assistant", "four")]
    assert read_chat(None, "here") == read_chat("", "here") == []
