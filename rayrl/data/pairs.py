"""Preference pairs from a user's rows: a chosen and a rejected answer, or several answers with their ranks.

The common published shapes are read as they are (see `chats`): answers as text, as one chat message, or as a chat
whose last assistant message counts. If `messages_column` names one of the two answers' columns, both hold whole chats:
the last message of each is the answer, and what stands before it the prompt.
"""

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from rayrl.config import PreferenceDataConfig
from rayrl.data.chats import read_chat, read_list, read_message, split_reply
from rayrl.data.reading import Render, prompt_of, text_cell
from rayrl.data.rows import Row, rows_with
from rayrl.errors import DataError
from rayrl.records import Prompt

_MAX_NAMED_ROWS = 5


@dataclass
class PairCounts:
    """What became of the rows read; filled while they are iterated."""

    num_rows: int = 0
    num_pairs: int = 0
    num_unusable: int = 0
    """Rows without a prompt, or without two answers that say something (and, if ranked, have a rank)."""
    num_tied: int = 0
    """Rows whose answers all have the same rank."""
    num_other_prompt: int = 0
    """Rows whose two chats differ before their last answer: those answer different prompts."""
    prompt_ids: set[str] = field(default_factory=set)


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """One answer to a prompt."""

    id: str
    """`data-<row number>-<place in the row>`."""
    text: str
    rank: float
    """0 is best."""


def pair_columns(config: PreferenceDataConfig) -> list[str]:
    """The columns a config asks its source for."""
    answers = [config.replies_column] if config.replies_column else [config.chosen_column, config.rejected_column]
    return list(dict.fromkeys([config.messages_column or config.prompt_column, *answers]))


def read_pairs(
    config: PreferenceDataConfig, render: Render, counts: PairCounts
) -> Iterator[tuple[Prompt, Answer, Answer]]:
    """(prompt, chosen, rejected) of every pair of answers to one prompt whose ranks differ.

    Args:
        config: where the pairs are.
        render: text or messages -> what the policy reads.
        counts: filled while iterating.

    Raises:
        DataError: see `rows_with`; a cell of the wrong type, with its row number; and, once everything is read,
            rows whose preferred and other answer are the same text.
    """
    same: list[int] = []
    rows = rows_with(config.path, config.split, pair_columns(config))
    for number, row in enumerate(itertools.islice(rows, config.limit), 1):
        where = f"{config.path}, row {number}"
        counts.num_rows += 1
        prompt = _prompt(row, config, render, where)
        answers = [answer for answer in _answers(row, config, number, where) if answer.text.strip()]
        if _differ_before_the_answer(row, config, where):
            counts.num_other_prompt += 1
        elif prompt is None or len(answers) < 2:
            counts.num_unusable += 1
        elif len({answer.rank for answer in answers}) == 1:
            counts.num_tied += 1
        else:
            for a, b in itertools.combinations(sorted(answers, key=lambda answer: answer.rank), 2):
                if a.rank < b.rank and a.text.strip() == b.text.strip():
                    same.append(number)
                elif a.rank < b.rank:
                    counts.num_pairs += 1
                    counts.prompt_ids.add(prompt.id)
                    yield prompt, a, b
    if same:
        shown = ", ".join(map(str, same[:_MAX_NAMED_ROWS])) + (" ..." if len(same) > _MAX_NAMED_ROWS else "")
        raise DataError(
            f"{config.path}: a chosen and a rejected answer must differ, and {len(same)} pairs do not (row {shown}); "
            "remove those rows"
        )


def _prompt(row: Row, config: PreferenceDataConfig, render: Render, where: str) -> Prompt | None:
    if config.messages_column is None:
        return prompt_of(text_cell(row.get(config.prompt_column), config.prompt_column, where), render)
    return prompt_of(split_reply(read_chat(row.get(config.messages_column), where))[0], render)


def _answers(row: Row, config: PreferenceDataConfig, number: int, where: str) -> list[Answer]:
    if config.replies_column is not None:
        found = [
            (read_message(reply, where), _rank(reply, where))
            for reply in read_list(row.get(config.replies_column), where)
        ]
        texts = [(message["content"], rank) for message, rank in found]
    else:
        columns = (config.chosen_column, config.rejected_column)
        texts = [(_reply(row.get(column), column, config, where), float(rank)) for rank, column in enumerate(columns)]
    return [
        Answer(id=f"data-{number}-{place}", text=text, rank=rank)
        for place, (text, rank) in enumerate(texts)
        if not math.isnan(rank)
    ]


def _reply(cell: Any, column: str, config: PreferenceDataConfig, where: str) -> str:
    """The text of an answer: of a chat the last assistant message."""
    if isinstance(cell, str | None) and not _is_whole_chat(config):
        return cell or ""
    chat = read_chat(cell, where)
    if not chat:
        return ""
    replies = [m["content"] for m in (chat[-1:] if _is_whole_chat(config) else chat) if m["role"] == "assistant"]
    if not replies:
        end = "end with" if _is_whole_chat(config) else "hold"
        raise DataError(f"{where}: column {column} must {end} an assistant message, got {str(cell)[:80]}")
    return replies[-1]


def _is_whole_chat(config: PreferenceDataConfig) -> bool:
    return config.messages_column in (config.chosen_column, config.rejected_column) and not config.replies_column


def _differ_before_the_answer(row: Row, config: PreferenceDataConfig, where: str) -> bool:
    if not _is_whole_chat(config):
        return False
    chosen, rejected = (read_chat(row.get(column), where) for column in (config.chosen_column, config.rejected_column))
    return chosen[:-1] != rejected[:-1]


def _rank(reply: Any, where: str) -> float:
    """A reply's rank; NaN where it has none."""
    rank = reply.get("rank")
    if rank is None:
        return math.nan
    if isinstance(rank, bool) or not isinstance(rank, int | float):
        raise DataError(f"{where}: a reply's rank must be a number, 0 for the best, got {rank!r}")
    return float(rank)
