"""Prompts, seed pairs and reference answers from a user's rows.

This module knows columns, chats and duplicates. It knows no file format (see `rows`) and no tokenizer:
callers pass `render`, which turns a text or a list of chat messages into the text that the policy reads.
"""

import itertools
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeVar

from rayrl.config import DataConfig, ReferenceAnswersConfig, SeedDataConfig
from rayrl.data.cells import NULL_WORDS, canonical, check_text, number_cell, text_cell
from rayrl.data.chats import (
    Messages,
    content_of,
    conversation_text,
    is_chat,
    lone_text,
    read_chat,
    read_reply,
    split_reply,
    split_turns,
)
from rayrl.data.control_tokens import has_control_tokens
from rayrl.data.rows import Row, SourceRow, Watch, read_rows
from rayrl.errors import DataError
from rayrl.records import Prompt, content_id

Render = Callable[[str | Messages], str]
Turns = Literal["last", "all"]
"""Turns of the assistant in a chat that are responses."""
Split = list[tuple[str | Messages, str]]
"""What a row asks and answers: (source of a prompt, response or "")."""
T = TypeVar("T")

UNREAD_COLUMNS = ("tools", "functions", "image", "images", "video", "videos", "audio", "audios")
"""Columns that published chats have beside their messages, and that no prompt is made of."""
UNREAD_CONTEXT = ("system", "system_prompt", "history", "instruction", "input", "context")
"""Columns that published instructions have beside their text, and that belong to what is asked."""
ALPACA = ("instruction", "input")
"""Columns of Alpaca's instructions, and of the texts they are about."""


@dataclass
class BadRows:
    """Rows that cannot be used: the first is refused, or they are counted and left out."""

    are_dropped: bool = False
    num: int = 0
    first: str = ""
    """What is wrong with the first one, with its file and row."""

    def add(self, error: DataError, num_rows: int = 1) -> None:
        """Count the rows of an error, or refuse them.

        Raises:
            DataError: rows are not dropped.
        """
        if not self.are_dropped:
            raise DataError(f'{error}; or leave such rows out with on_bad_row = "drop" beside the path') from None
        self.num += num_rows
        self.first = self.first or str(error)

    def in_words(self) -> str:
        """Tell how many rows were left out, and why the first; "" if none was."""
        return f"dropped {self.num} bad rows, the first of them {self.first}" if self.num else ""


@dataclass
class PromptCounts:
    """Counts of the rows read, by their outcome; filled while a reader is iterated."""

    num_rows: int = 0
    num_kept: int = 0
    num_empty: int = 0
    """Rows without a prompt (or, in seed data, without a response)."""
    num_duplicate: int = 0
    num_below_score: int = 0
    num_without_score: int = 0
    """Rows whose score is empty, or not a number (NaN); they do not pass."""
    bad_rows: BadRows = field(default_factory=BadRows)
    """Rows dropped by `on_bad_row`."""
    num_skipped_turns: int = 0
    """Turns of the assistant in kept rows that are no responses: empty, calling a tool, or before any text of the
    user."""
    num_with_control_tokens: int = 0
    """Prompts whose texts hold control tokens of the policy's tokenizer; it reads those as ordinary text."""
    num_null_words: int = 0
    """Prompts that are but a word that programs write for an empty cell, such as "nan"."""
    num_dialogues: int = 0
    """Prompts of `prompt_column` that are a whole chat, "Human: ... Assistant: ..." or messages as JSON."""
    unread_columns: Counter[str] = field(default_factory=Counter[str])
    """Rows by a column of `UNREAD_COLUMNS` or `UNREAD_CONTEXT` that holds something and is not used."""


@dataclass(frozen=True, kw_only=True)
class Room:
    """The policy's context, which a prompt must not fill."""

    num_tokens: int
    count_tokens: Callable[[str], int]
    """Counts the tokens of a rendered prompt."""

    def exceeded_by(self, prompt: Prompt) -> int:
        """Return the number of tokens of a prompt that leaves no room for another one; 0 of any other prompt."""
        # A token takes a byte at least, and a character four at most: most prompts need not be encoded to know.
        if 4 * len(prompt.rendered) + 2 < self.num_tokens or len(prompt.rendered.encode()) + 2 < self.num_tokens:
            return 0
        num_tokens = self.count_tokens(prompt.rendered)
        return num_tokens if num_tokens >= self.num_tokens else 0


@dataclass
class _TooLong:
    """Prompts that fill the context, where they are refused: all are counted before the refusal."""

    num: int = 0
    first: str = ""
    most_tokens: int = 0

    def add(self, num_tokens: int, where: str) -> None:
        self.num += 1
        self.first = self.first or f"{where}, with {num_tokens}"
        self.most_tokens = max(self.most_tokens, num_tokens)

    def refuse(self, room: Room, num_prompts: int) -> None:
        if self.num:
            raise DataError(
                f"a prompt must be shorter than the context of {room.num_tokens} tokens, but {self.num} of "
                f"{num_prompts} are not (the first: {self.first}); the longest has {self.most_tokens}. Shorten or "
                "remove them, raise policy.max_model_len if the model allows it, or leave them out with "
                'on_bad_row = "drop" beside the path'
            )


def read_prompts(
    config: DataConfig, render: Render, counts: PromptCounts | None = None, room: Room | None = None
) -> Iterator[Prompt]:
    """Yield the prompts of a pool, without empty ones and without duplicates.

    Prompts are duplicates if their texts differ in nothing but white space at the ends of lines and around the whole
    text, Windows' line breaks and the composition of characters (Unicode's normal form C); the first one counts.

    Args:
        config: source of the prompts. Of chat messages, the assistant's turn at the end is cut off.
        render: text or messages -> the text that the policy reads.
        counts: filled while iterating.
        room: refuses prompts that fill the policy's context; None refuses none.

    Raises:
        DataError: see `rows.read_rows`; also, if bad rows are refused, with its row number: a cell of the wrong type,
            a chat that the policy's chat template refuses, or a prompt that is too long.
    """
    counts = counts if counts is not None else PromptCounts()
    # Ids, which are hashes of texts: the texts themselves would take as much memory as the file.
    seen: set[str] = set()
    too_long = _TooLong()

    def parse(row: Row) -> Prompt | None:
        ((source, _),) = _split_row(row, config, None)
        prompt = prompt_of(source, render, row.where)
        if prompt is not None and room is not None and (num_tokens := room.exceeded_by(prompt)):
            if config.on_bad_row == "drop":
                raise DataError(f"{row.where}: its prompt has {num_tokens} tokens, and the context {room.num_tokens}")
            too_long.add(num_tokens, row.where)
        counts.num_dialogues += isinstance(source, str) and is_chat(source)
        return prompt

    for prompt in _parsed(config, counts, parse):
        if prompt is None:
            counts.num_empty += 1
            continue
        key = content_id(canonical(prompt.text))
        if key in seen:
            counts.num_duplicate += 1
            continue
        seen.add(key)
        counts.num_kept += 1
        counts.num_with_control_tokens += has_control_tokens(prompt.rendered)
        counts.num_null_words += len(prompt.text) < 16 and prompt.text.strip().lower() in NULL_WORDS
        yield prompt
    if room is not None:
        too_long.refuse(room, counts.num_kept + counts.num_duplicate)


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

    def parse(row: Row) -> tuple[int, list[tuple[Prompt, str]]] | None:
        """Return the number of turns, and the pairs; None of a row that does not score enough."""
        if not _scores_enough(row, config, counts):
            return None
        split = _split_row(row, config, config.response_column, turns)
        return len(split), _answered(split, render, row.where)

    for parsed in _parsed(config, counts, parse):
        if parsed is None:
            continue
        num_turns, pairs = parsed
        if not pairs:
            counts.num_empty += 1
            continue
        counts.num_kept += 1
        counts.num_skipped_turns += num_turns - len(pairs)
        yield from pairs


def read_reference_answers(
    config: ReferenceAnswersConfig, render: Render, counts: PromptCounts | None = None
) -> Iterator[tuple[Prompt, str]]:
    """Yield the (prompt, answer) pairs of a table of reference answers; rows without an answer are left out."""
    counts = counts if counts is not None else PromptCounts()

    def parse(row: Row) -> list[tuple[Prompt, str]]:
        return _answered(_split_row(row, config, config.response_column), render, row.where)

    for pairs in _parsed(config, counts, parse):
        counts.num_kept += len(pairs)
        counts.num_empty += not pairs
        yield from pairs


def columns_of(config: DataConfig) -> list[str]:
    """List the columns that a config needs in its source."""
    columns = [config.messages_column or config.prompt_column]
    if config.messages_column is None and config.input_column:
        columns.append(config.input_column)
    if isinstance(config, SeedDataConfig | ReferenceAnswersConfig) and config.messages_column is None:
        columns.append(config.response_column)
    if isinstance(config, SeedDataConfig) and config.score_column is not None:
        columns.append(config.score_column)
    return columns


def input_column(config: DataConfig) -> str | None:
    """Return the column whose texts follow the prompts, if a row has it."""
    if config.messages_column is not None:
        return None
    instruction, its_input = ALPACA
    if config.input_column is None and config.prompt_column == instruction:
        return its_input
    return config.input_column or None


def rows_of(config: DataConfig, needed: Sequence[str], unread_columns: Counter[str] | None = None) -> Iterator[Row]:
    """Read the rows of a config's source up to its limit, with only the needed columns; count those that are not used.

    Raises:
        DataError: see `rows.read_rows`.
    """
    optional = [column] if (column := input_column(config)) else []
    unread = UNREAD_COLUMNS + (UNREAD_CONTEXT[:3] if config.messages_column else UNREAD_CONTEXT)
    watched = [name for name in unread if name not in needed and name not in optional]
    watch = Watch(columns=watched, num_rows=Counter() if unread_columns is None else unread_columns)
    rows = read_rows(config.path, needed, optional=optional, split=config.split, encoding=config.encoding, watch=watch)
    num_rows = 0
    for row in itertools.islice(rows, config.limit):
        num_rows += 1
        yield row
    # Of Parquet and Arrow, whole files and batches are counted, also behind the limit.
    for name in watched:
        if watch.num_rows[name] > num_rows:
            watch.num_rows[name] = num_rows


def _parsed(config: DataConfig, counts: PromptCounts, parse: Callable[[Row], T]) -> Iterator[T]:
    """Yield what each row is parsed into; rows that cannot be are refused or dropped, as the config has it."""
    counts.bad_rows.are_dropped = config.on_bad_row == "drop"
    for row in rows_of(config, columns_of(config), counts.unread_columns):
        counts.num_rows += 1
        try:
            parsed = parse(row)
        except DataError as error:
            counts.bad_rows.add(error)
            continue
        yield parsed


def _split_row(row: Row, config: DataConfig, response_column: str | None, turns: Turns = "last") -> Split:
    """Return what a row asks and answers: one pair, or with all turns one for each turn of the assistant."""
    if config.messages_column is not None:
        chat = read_chat(row.cells.get(config.messages_column), f"{row.where}, column {config.messages_column}")
        return [*split_turns(chat)] if turns == "all" else [split_reply(chat)]
    response = ""
    if response_column:
        cell = text_cell(row.cells.get(response_column), response_column, row.where)
        response = read_reply(cell, f"{row.where}, column {response_column}")
    return [(prompt_text(row.cells, config, row.where), response)]


def prompt_text(cells: SourceRow, config: DataConfig, where: str) -> str:
    """Return the text of a row's prompt, with that of its input behind it.

    Raises:
        DataError: a cell holds no text.
    """
    text = text_cell(cells.get(config.prompt_column), config.prompt_column, where)
    column = input_column(config)
    extra = text_cell(cells.get(column), column, where) if column else ""
    return f"{text}\n\n{extra}" if text.strip() and extra.strip() else text or extra


def _answered(split: Split, render: Render, where: str) -> list[tuple[Prompt, str]]:
    """Return the pairs of a row that have both a prompt and a response."""
    pairs: list[tuple[Prompt, str]] = []
    for source, response in split:
        check_text(response, "the response", where)
        if response.strip() and (prompt := prompt_of(source, render, where)) is not None:
            pairs.append((prompt, response))
    return pairs


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
    text = lone_text(source) if isinstance(source, str) else conversation_text(source)
    check_text(text, "the prompt", where)
    try:
        rendered = render(source)
    except DataError as error:
        raise DataError(f"{where}: {error}") from None
    return Prompt(id=content_id(rendered), text=text, rendered=rendered)


def _scores_enough(row: Row, config: SeedDataConfig, counts: PromptCounts) -> bool:
    """Return whether a row passes, and count one that does not."""
    if config.score_column is None or config.min_score is None:
        return True
    score = number_cell(row.cells.get(config.score_column), config.score_column, row.where)
    if score is None:
        counts.num_without_score += 1
        return False
    counts.num_below_score += score < config.min_score
    return score >= config.min_score
