"""Preference pairs from a user's rows: a chosen and a rejected reply, or several replies with their ranks.

The common published shapes are read as they are (see `chats`): replies as text, as one chat message, or as a chat
whose last assistant message counts. If `messages_column` names one of the two replies' columns, both hold whole chats:
the assistant's turn at the end of each is the reply, and the messages before it the prompt.
"""

import itertools
import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import cast

from rayrl.config import PreferenceDataConfig
from rayrl.data.cells import check_text, number_cell
from rayrl.data.chats import Messages, content_of, read_chat, read_list, read_message, read_reply, split_reply
from rayrl.data.reading import BadRows, Render, prompt_of, prompt_text, rows_of
from rayrl.data.rows import Row, SourceRow
from rayrl.errors import DataError
from rayrl.records import Prompt

MAX_NAMED_ROWS = 5
"""Rows that a refusal names."""
SCORE_NAMES = ("overall_score", "score")
"""Published names of a reply's score (UltraFeedback)."""


@dataclass
class PairCounts:
    """Counts of the rows read, by their outcome; filled while they are iterated."""

    num_rows: int = 0
    num_pairs: int = 0
    num_unusable: int = 0
    """Rows without a prompt, or without two replies that are not empty (and, if ranked, have a rank)."""
    num_tied: int = 0
    """Rows whose replies all have the same rank."""
    num_other_prompt: int = 0
    """Rows whose two chats differ before their last message: those reply to different prompts."""
    bad_rows: BadRows = field(default_factory=BadRows)
    """Rows dropped by `on_bad_row`."""
    prompt_ids: set[str] = field(default_factory=set)
    unread_columns: Counter[str] = field(default_factory=Counter[str])
    """Rows by a column that holds something and is not used; see `reading.PromptCounts`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RankedReply:
    """One of the replies to a prompt."""

    id: str
    """`data-<row number>-<place in the row>`."""
    text: str
    rank: float
    """0 is best."""


def pair_columns(config: PreferenceDataConfig) -> list[str]:
    """List the columns that a config needs in its source."""
    replies = [config.replies_column] if config.replies_column else [config.chosen_column, config.rejected_column]
    asked = [config.messages_column or config.prompt_column]
    if config.messages_column is None and config.input_column:
        asked.append(config.input_column)
    columns = [*asked, *replies]
    return list(dict.fromkeys(columns))  # whole chats: one column is both prompt and reply


def read_pairs(
    config: PreferenceDataConfig, render: Render, counts: PairCounts
) -> Iterator[tuple[Prompt, RankedReply, RankedReply]]:
    """Yield (prompt, chosen, rejected) of every pair of replies to one prompt whose ranks differ.

    Args:
        config: source of the pairs.
        render: text or messages -> the text that the policy reads.
        counts: filled while iterating.

    Raises:
        DataError: see `rows.read_rows`; also, if bad rows are refused: a cell of the wrong type, with its row number;
            and, once everything is read, rows whose preferred and other reply are the same text.
    """
    counts.bad_rows.are_dropped = config.on_bad_row == "drop"
    num_equal_pairs, rows_of_equal_texts = 0, dict[int, None]()
    for row in rows_of(config, pair_columns(config), counts.unread_columns):
        counts.num_rows += 1
        try:
            prompt = _prompt(row.cells, config, render, row.where)
            replies = [reply for reply in _replies(row, config) if reply.text.strip()]
            differ = _differ_before_the_reply(row.cells, config, row.where)
        except DataError as error:
            counts.bad_rows.add(error)
            continue
        if differ:
            counts.num_other_prompt += 1
        elif prompt is None or len(replies) < 2:
            counts.num_unusable += 1
        elif len({reply.rank for reply in replies}) == 1:
            counts.num_tied += 1
        else:
            by_rank = sorted(replies, key=lambda reply: reply.rank)
            for better, worse in itertools.combinations(by_rank, 2):
                if better.rank == worse.rank:
                    continue
                if better.text.strip() == worse.text.strip():
                    num_equal_pairs += 1
                    rows_of_equal_texts[row.number] = None
                    continue
                counts.num_pairs += 1
                counts.prompt_ids.add(prompt.id)
                yield prompt, better, worse
    # Only now, so that one message counts them all.
    if rows_of_equal_texts:
        shown = ", ".join(map(str, itertools.islice(rows_of_equal_texts, MAX_NAMED_ROWS)))
        more = " ..." if len(rows_of_equal_texts) > MAX_NAMED_ROWS else ""
        error = DataError(
            f"{config.path}: a chosen and a rejected answer must differ, and {num_equal_pairs} pairs do not "
            f"(row {shown}{more}); remove those rows"
        )
        counts.bad_rows.add(error, len(rows_of_equal_texts))


def _prompt(cells: SourceRow, config: PreferenceDataConfig, render: Render, where: str) -> Prompt | None:
    if config.messages_column is None:
        return prompt_of(prompt_text(cells, config, where), render, where)
    messages, _ = split_reply(_chat(cells, config.messages_column, where))
    return prompt_of(messages, render, where)


def _chat(cells: SourceRow, column: str, where: str) -> Messages:
    return read_chat(cells.get(column), f"{where}, column {column}")


def _replies(row: Row, config: PreferenceDataConfig) -> list[RankedReply]:
    """Read all replies of a row that have a rank, in the order of the row."""
    texts: list[tuple[str, float]] = []
    if config.replies_column is not None:
        where = f"{row.where}, column {config.replies_column}"
        cells = read_list(row.cells.get(config.replies_column), where)
        messages = [read_message(cell, where, default_role="assistant") for cell in cells]
        ranks = _ranks(cast("list[SourceRow]", cells), where)
        texts += zip(map(content_of, messages), ranks, strict=True)
    else:
        for rank, column in enumerate((config.chosen_column, config.rejected_column)):
            cell = row.cells.get(column)
            # Several texts are several replies of the same rank.
            cells = cell if isinstance(cell, list) and cell and all(isinstance(each, str) for each in cell) else [cell]
            texts += [(_reply(each, column, config, row.where), float(rank)) for each in cells]
    replies: list[RankedReply] = []
    for place, (text, rank) in enumerate(texts):
        check_text(text, "a reply", row.where)
        # A reply without a rank keeps its place: ids say where a text stands in the row.
        if not math.isnan(rank):
            replies.append(RankedReply(id=f"data-{row.number}-{place}", text=text, rank=rank))
    return replies


def _reply(cell: object, column: str, config: PreferenceDataConfig, where: str) -> str:
    """Read the text of a reply; see `chats.read_reply`.

    A whole chat must end with the reply, since the messages before it are taken for the prompt: "" if it does not.
    """
    where = f"{where}, column {column}"
    if _holds_whole_chats(config):
        return split_reply(read_chat(cell, where))[1]
    return read_reply(cell, where)


def _holds_whole_chats(config: PreferenceDataConfig) -> bool:
    """Return whether the two replies' columns hold the prompt too."""
    return config.messages_column in (config.chosen_column, config.rejected_column) and not config.replies_column


def _differ_before_the_reply(cells: SourceRow, config: PreferenceDataConfig, where: str) -> bool:
    if not _holds_whole_chats(config):
        return False
    chosen, rejected = (_chat(cells, column, where) for column in (config.chosen_column, config.rejected_column))
    return split_reply(chosen)[0] != split_reply(rejected)[0]


def _ranks(replies: list[SourceRow], where: str) -> list[float]:
    """Read the ranks of a row's replies, or those of their scores, the highest of which is best; NaN for none.

    Raises:
        DataError: some of the replies have a rank, and others a score alone.
    """
    ranks = [number_cell(reply.get("rank"), "rank", where) for reply in replies]
    scores = [_score(reply, where) for reply in replies]
    if all(rank is None for rank in ranks):
        return [math.nan if score is None else -score for score in scores]
    if any(rank is None and score is not None for rank, score in zip(ranks, scores, strict=True)):
        raise DataError(
            f"{where}: some replies have a rank and others only a score, and the two cannot be ordered; give all of "
            "them ranks, or all of them scores"
        )
    return [math.nan if rank is None else rank for rank in ranks]


def _score(reply: SourceRow, where: str) -> float | None:
    name = next((name for name in SCORE_NAMES if reply.get(name) is not None), None)
    return None if name is None else number_cell(reply[name], name, where)
