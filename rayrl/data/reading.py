"""Prompts, seed pairs and reference answers from a user's rows.

This module knows columns, chats and duplicates. It knows no file format (see `rows`) and no tokenizer:
callers hand in `render`, which turns a text or a list of chat messages into what the policy reads.
"""

import itertools
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from rayrl.config import DataConfig, ReferenceAnswersConfig, SeedDataConfig
from rayrl.data.rows import Row, read_rows, require_columns, rows_with
from rayrl.errors import DataError
from rayrl.records import Prompt, content_id

__all__ = [
    "PromptCounts",
    "columns_of",
    "read_prompts",
    "read_reference_answers",
    "read_rows",
    "read_seed_rows",
    "require_columns",
    "text_cell",
]

Messages = list[dict[str, str]]
Render = Callable[[str | Messages], str]


@dataclass
class PromptCounts:
    """What became of the rows read; filled while a reader is iterated."""

    num_rows: int = 0
    num_kept: int = 0
    num_empty: int = 0
    """Rows without a prompt (or, in seed data, without a response)."""
    num_duplicate: int = 0
    num_below_score: int = 0


def read_prompts(config: DataConfig, render: Render, counts: PromptCounts | None = None) -> Iterator[Prompt]:
    """The prompts of a pool, without empty ones and without exact duplicates (same rendered text).

    Args:
        config: where the prompts are. Of chat messages, a trailing assistant message is cut off.
        render: text or messages -> what the policy reads.
        counts: filled while iterating.

    Raises:
        DataError: see `require_columns`; also a cell of the wrong type, with its row number.
    """
    counts = counts if counts is not None else PromptCounts()
    seen: set[str] = set()
    for prompt, _ in _cells(config, None, render, counts):
        if prompt.id in seen:
            counts.num_duplicate += 1
            continue
        seen.add(prompt.id)
        counts.num_kept += 1
        yield prompt


def read_seed_rows(
    config: SeedDataConfig, render: Render, counts: PromptCounts | None = None
) -> Iterator[tuple[Prompt, str]]:
    """Supervised (prompt, response) pairs; with `score_column`, those that score at least `min_score`.

    Of chat messages the last one must be the assistant's: it is the response.

    Raises:
        DataError: see `read_prompts`; also a score that is no number.
    """
    counts = counts if counts is not None else PromptCounts()
    for prompt, response in _cells(config, config.response_column, render, counts):
        if not response.strip():
            counts.num_empty += 1
            continue
        counts.num_kept += 1
        yield prompt, response


def read_reference_answers(config: ReferenceAnswersConfig, render: Render) -> Iterator[tuple[Prompt, str]]:
    """The (prompt, answer) pairs of a table of reference answers; rows without an answer are left out."""
    for prompt, answer in _cells(config, config.response_column, render, PromptCounts()):
        if answer.strip():
            yield prompt, answer


def columns_of(config: DataConfig) -> list[str]:
    """The columns a config asks its source for."""
    columns = [config.messages_column or config.prompt_column]
    if isinstance(config, SeedDataConfig | ReferenceAnswersConfig) and config.messages_column is None:
        columns.append(config.response_column)
    if isinstance(config, SeedDataConfig) and config.score_column is not None:
        columns.append(config.score_column)
    return columns


def _cells(
    config: DataConfig, response_column: str | None, render: Render, counts: PromptCounts
) -> Iterator[tuple[Prompt, str]]:
    """(Prompt, response or "") of every row that has a prompt and scores enough."""
    rows = rows_with(config.path, config.split, columns_of(config))
    for number, row in enumerate(itertools.islice(rows, config.limit), 1):
        where = f"{config.path}, row {number}"
        counts.num_rows += 1
        if isinstance(config, SeedDataConfig) and not _scores_enough(row, config, where):
            counts.num_below_score += 1
            continue
        if config.messages_column is not None:
            messages, response = _split_reply(_messages(row.get(config.messages_column), where))
            text = next((m["content"] for m in reversed(messages) if m["role"] == "user"), "")
            source: str | Messages = messages
        else:
            text = source = text_cell(row.get(config.prompt_column), config.prompt_column, where)
            response = text_cell(row.get(response_column), response_column, where) if response_column else ""
        if not text.strip():
            counts.num_empty += 1
            continue
        rendered = render(source)
        yield Prompt(id=content_id(rendered), text=text, rendered=rendered), response


def _scores_enough(row: Row, config: SeedDataConfig, where: str) -> bool:
    if config.score_column is None or config.min_score is None:
        return True
    score = row.get(config.score_column)
    if score is None or score == "":
        return False
    try:
        return float(score) >= config.min_score
    except (TypeError, ValueError):
        raise DataError(f"{where}: column {config.score_column} must be a number, got {score!r}") from None


def text_cell(cell: Any, column: str, where: str) -> str:
    """A cell that holds text, or nothing.

    Raises:
        DataError: it holds something else.
    """
    if cell is not None and not isinstance(cell, str):
        hint = "; a chat belongs into messages_column" if isinstance(cell, list) else ""
        raise DataError(f"{where}: column {column} must be text, got {type(cell).__name__}{hint}")
    return cell or ""


def _messages(cell: Any, where: str) -> Messages:
    if isinstance(cell, str):  # CSV has no lists
        try:
            cell = json.loads(cell) if cell.strip() else []
        except json.JSONDecodeError as error:
            raise DataError(f"{where}: messages must be a JSON list: {error}") from None
    for message in cell or []:
        texts = isinstance(message, dict) and [message.get("role"), message.get("content")]
        if not texts or not all(isinstance(text, str) for text in texts):
            raise DataError(f'{where}: a message must be {{"role": text, "content": text}}, got {str(message)[:80]}')
    return [{"role": m["role"], "content": m["content"]} for m in cell or []]


def _split_reply(messages: Messages) -> tuple[Messages, str]:
    if messages and messages[-1]["role"] == "assistant":
        return messages[:-1], messages[-1]["content"]
    return messages, ""
