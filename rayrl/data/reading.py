"""Prompts, seed pairs and reference answers from a user's rows.

This module knows columns, chats and duplicates. It knows no file format (see `rows`) and no tokenizer:
callers pass `render`, which turns a text or a list of chat messages into the text that the policy reads.
"""

import itertools
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Literal

from rayrl.config import DataConfig, ReferenceAnswersConfig, SeedDataConfig
from rayrl.data.chats import Messages, content_of, conversation_text, lone_text, read_chat, split_reply, split_turns
from rayrl.data.control_tokens import has_control_tokens
from rayrl.data.rows import SourceRow, read_rows, require_columns, rows_with
from rayrl.errors import DataError
from rayrl.records import Prompt, content_id

__all__ = [
    "PromptCounts",
    "columns_of",
    "prompt_of",
    "read_prompts",
    "read_reference_answers",
    "read_rows",
    "read_seed_rows",
    "require_columns",
    "text_cell",
]

Render = Callable[[str | Messages], str]
Turns = Literal["last", "all"]
"""Turns of the assistant in a chat that are responses."""

UNREAD_COLUMNS = ("tools", "functions", "image", "images", "video", "videos", "audio", "audios")
"""Columns that published chats have beside their messages, and that no prompt is made of."""


@dataclass
class PromptCounts:
    """Counts of the rows read, by their outcome; filled while a reader is iterated."""

    num_rows: int = 0
    num_kept: int = 0
    num_empty: int = 0
    """Rows without a prompt (or, in seed data, without a response)."""
    num_duplicate: int = 0
    num_below_score: int = 0
    num_skipped_turns: int = 0
    """Turns of the assistant in kept rows that are no responses: empty, calling a tool, or before any text of the
    user."""
    num_with_control_tokens: int = 0
    """Prompts whose texts hold control tokens of the policy's tokenizer; it reads those as ordinary text."""
    unread_columns: Counter[str] = field(default_factory=Counter[str])
    """Rows of chats by a column of `UNREAD_COLUMNS` that holds something."""


def read_prompts(config: DataConfig, render: Render, counts: PromptCounts | None = None) -> Iterator[Prompt]:
    """Yield the prompts of a pool, without empty ones and without exact duplicates (same rendered text).

    Args:
        config: source of the prompts. Of chat messages, the assistant's turn at the end is cut off.
        render: text or messages -> the text that the policy reads.
        counts: filled while iterating.

    Raises:
        DataError: see `require_columns`; also, with its row number, a cell of the wrong type, or a chat that the
            policy's chat template refuses.
    """
    counts = counts if counts is not None else PromptCounts()
    # Ids, which are hashes of the rendered texts: the texts themselves would take as much memory as the file.
    seen: set[str] = set()
    for where, ((source, _),) in _split_rows(config, None, counts):
        prompt = prompt_of(source, render, where)
        if prompt is None:
            counts.num_empty += 1
            continue
        if prompt.id in seen:
            counts.num_duplicate += 1
            continue
        seen.add(prompt.id)
        counts.num_kept += 1
        counts.num_with_control_tokens += has_control_tokens(prompt.rendered)
        yield prompt


def read_seed_rows(
    config: SeedDataConfig, render: Render, counts: PromptCounts | None = None, *, turns: Turns = "last"
) -> Iterator[tuple[Prompt, str]]:
    """Yield supervised (prompt, response) pairs; with `score_column`, those of rows that score at least `min_score`.

    Args:
        config: source of the rows.
        render: see `read_prompts`.
        counts: filled while iterating; it counts rows.
        turns: of a chat, the response is the assistant's turn at its end, which it must have; or each turn of the
            assistant is a response of its own, and its prompt is the chat before it.

    Raises:
        DataError: see `read_prompts`; also a score that is no number.
    """
    counts = counts if counts is not None else PromptCounts()
    for where, split in _split_rows(config, config.response_column, counts, turns):
        pairs = [
            (prompt, response)
            for source, response in split
            if response.strip() and (prompt := prompt_of(source, render, where)) is not None
        ]
        if not pairs:
            counts.num_empty += 1
            continue
        counts.num_kept += 1
        counts.num_skipped_turns += len(split) - len(pairs)
        yield from pairs


def read_reference_answers(config: ReferenceAnswersConfig, render: Render) -> Iterator[tuple[Prompt, str]]:
    """Yield the (prompt, answer) pairs of a table of reference answers; rows without an answer are left out."""
    for where, ((source, answer),) in _split_rows(config, config.response_column, PromptCounts()):
        prompt = prompt_of(source, render, where)
        if prompt is not None and answer.strip():
            yield prompt, answer


def columns_of(config: DataConfig) -> list[str]:
    """List the columns that a config needs in its source."""
    columns = [config.messages_column or config.prompt_column]
    if isinstance(config, SeedDataConfig | ReferenceAnswersConfig) and config.messages_column is None:
        columns.append(config.response_column)
    if isinstance(config, SeedDataConfig) and config.score_column is not None:
        columns.append(config.score_column)
    return columns


def _split_rows(
    config: DataConfig, response_column: str | None, counts: PromptCounts, turns: Turns = "last"
) -> Iterator[tuple[str, list[tuple[str | Messages, str]]]]:
    """Yield the name of every row that scores enough, with its (source of a prompt, response or "").

    It is one pair, or with all turns one for each turn of the assistant.
    """
    rows = rows_with(config.path, config.split, columns_of(config))
    for number, row in enumerate(itertools.islice(rows, config.limit), 1):
        where = f"{config.path}, row {number}"
        counts.num_rows += 1
        if isinstance(config, SeedDataConfig) and not _scores_enough(row, config, where):
            counts.num_below_score += 1
            continue
        split: list[tuple[str | Messages, str]]
        if config.messages_column is not None:
            counts.unread_columns.update(column for column in UNREAD_COLUMNS if row.get(column))
            chat = read_chat(row.get(config.messages_column), where)
            split = [*split_turns(chat)] if turns == "all" else [split_reply(chat)]
        else:
            source = text_cell(row.get(config.prompt_column), config.prompt_column, where)
            response = text_cell(row.get(response_column), response_column, where) if response_column else ""
            split = [(source, response)]
        yield where, split


def prompt_of(source: str | Messages, render: Render, where: str) -> Prompt | None:
    """Make a prompt of a text, or of a chat without its reply; None if it asks nothing.

    Raises:
        DataError: the policy cannot read it; the message names the row, `where`.
    """
    if isinstance(source, str):
        asked = source
    else:
        user_texts = [content_of(message) for message in source if message["role"] == "user"]
        asked = user_texts[-1] if user_texts else ""
    if not asked.strip():
        return None
    try:
        rendered = render(source)
    except DataError as error:
        raise DataError(f"{where}: {error}") from None
    text = lone_text(source) if isinstance(source, str) else conversation_text(source)
    return Prompt(id=content_id(rendered), text=text, rendered=rendered)


def _scores_enough(row: SourceRow, config: SeedDataConfig, where: str) -> bool:
    if config.score_column is None or config.min_score is None:
        return True
    score = row.get(config.score_column)
    # A row without a score is left out, and a score of the wrong type refused: CSV has only text.
    if score is None or score == "":
        return False
    try:
        return float(score) >= config.min_score  # pyright: ignore[reportArgumentType]
    except (TypeError, ValueError):
        raise DataError(f"{where}: column {config.score_column} must be a number, got {score!r}") from None


def text_cell(cell: object, column: str, where: str) -> str:
    """Read a cell that holds text, or nothing.

    Raises:
        DataError: it holds something else.
    """
    if cell is not None and not isinstance(cell, str):
        hint = "; a chat belongs into messages_column" if isinstance(cell, list) else ""
        raise DataError(f"{where}: column {column} must be text, got {type(cell).__name__}{hint}")
    return cell or ""
