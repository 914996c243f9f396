"""Preference pairs from a user's rows: a chosen and a rejected reply, or several replies with their ranks.

The common published shapes are read as they are (see `chats`): replies as text, as one chat message, or as a chat
whose last assistant message counts. If `messages_column` names one of the two replies' columns, both hold whole chats:
the assistant's turn at the end of each is the reply, and the messages before it the prompt.
"""

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, field

from rayrl.config import PreferenceDataConfig
from rayrl.data.chats import content_of, read_chat, read_list, read_message, split_reply
from rayrl.data.reading import Render, prompt_of, text_cell
from rayrl.data.rows import SHOWN_CHARACTERS, SourceRow, rows_with
from rayrl.errors import DataError
from rayrl.records import Prompt

MAX_NAMED_ROWS = 5
"""Rows that a refusal names."""


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
    prompt_ids: set[str] = field(default_factory=set)


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
    columns = [config.messages_column or config.prompt_column, *replies]
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
        DataError: see `rows_with`; a cell of the wrong type, with its row number; and, once everything is read,
            rows whose preferred and other reply are the same text.
    """
    rows_of_equal_texts: list[int] = []
    rows = rows_with(config.path, config.split, pair_columns(config))
    for number, row in enumerate(itertools.islice(rows, config.limit), 1):
        where = f"{config.path}, row {number}"
        counts.num_rows += 1
        prompt = _prompt(row, config, render, where)
        replies = [reply for reply in _replies(row, config, number, where) if reply.text.strip()]
        if _differ_before_the_reply(row, config, where):
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
                    rows_of_equal_texts.append(number)
                    continue
                counts.num_pairs += 1
                counts.prompt_ids.add(prompt.id)
                yield prompt, better, worse
    # Only now, so that one message counts them all.
    if rows_of_equal_texts:
        shown = ", ".join(map(str, rows_of_equal_texts[:MAX_NAMED_ROWS]))
        more = " ..." if len(rows_of_equal_texts) > MAX_NAMED_ROWS else ""
        raise DataError(
            f"{config.path}: a chosen and a rejected answer must differ, and {len(rows_of_equal_texts)} pairs do not "
            f"(row {shown}{more}); remove those rows"
        )


def _prompt(row: SourceRow, config: PreferenceDataConfig, render: Render, where: str) -> Prompt | None:
    if config.messages_column is None:
        return prompt_of(text_cell(row.get(config.prompt_column), config.prompt_column, where), render, where)
    messages, _ = split_reply(read_chat(row.get(config.messages_column), where))
    return prompt_of(messages, render, where)


def _replies(row: SourceRow, config: PreferenceDataConfig, number: int, where: str) -> list[RankedReply]:
    """Read all replies of a row that have a rank, in the order of the row."""
    texts: list[tuple[str, float]] = []
    if config.replies_column is not None:
        for cell in read_list(row.get(config.replies_column), where):
            message = read_message(cell, where, default_role="assistant")
            texts.append((content_of(message), _rank(cell, where)))
    else:
        for rank, column in enumerate((config.chosen_column, config.rejected_column)):
            texts.append((_reply(row.get(column), column, config, where), float(rank)))
    replies: list[RankedReply] = []
    for place, (text, rank) in enumerate(texts):
        # A reply without a rank keeps its place: ids say where a text stands in the row.
        if not math.isnan(rank):
            replies.append(RankedReply(id=f"data-{number}-{place}", text=text, rank=rank))
    return replies


def _reply(cell: object, column: str, config: PreferenceDataConfig, where: str) -> str:
    """Read the text of a reply; of a chat, its last assistant message, which need not name its role.

    A whole chat must end with the reply, since the messages before it are taken for the prompt: "" if it does not.
    """
    if _holds_whole_chats(config):
        return split_reply(read_chat(cell, where))[1]
    if isinstance(cell, str | None):
        return cell or ""
    chat = read_chat(cell, where, default_role="assistant")
    if not chat:
        return ""
    texts = [content_of(message) for message in chat if message["role"] == "assistant"]
    if not texts:
        shown = str(cell)[:SHOWN_CHARACTERS]
        raise DataError(f"{where}: column {column} must hold an assistant message, got {shown}")
    return texts[-1]


def _holds_whole_chats(config: PreferenceDataConfig) -> bool:
    """Return whether the two replies' columns hold the prompt too."""
    return config.messages_column in (config.chosen_column, config.rejected_column) and not config.replies_column


def _differ_before_the_reply(row: SourceRow, config: PreferenceDataConfig, where: str) -> bool:
    if not _holds_whole_chats(config):
        return False
    chosen = read_chat(row.get(config.chosen_column), where)
    rejected = read_chat(row.get(config.rejected_column), where)
    return split_reply(chosen)[0] != split_reply(rejected)[0]


def _rank(cell: object, where: str) -> float:
    """Read a reply's rank; NaN where it has none."""
    assert isinstance(cell, dict)  # read_message refused it otherwise
    rank = cell.get("rank")
    if rank is None:
        return math.nan
    if isinstance(rank, bool) or not isinstance(rank, int | float):
        raise DataError(f"{where}: a reply's rank must be a number, 0 for the best, got {rank!r}")
    return float(rank)
