"""Artifacts that stages hand to each other: a key and the tables it names, never rows.

An artifact's key names the work behind it, so that a stage which reads it can name its own. Artifacts are values: they
travel to Ray tasks, and making one starts nothing.
"""

from dataclasses import dataclass
from typing import TypedDict, cast

from rayrl.data.blocks import BlockTable
from rayrl.records import Judgement, ResponseKey, from_table


@dataclass(frozen=True, kw_only=True)
class Pool:
    """The unlabelled prompts X and the held-out ones, both with their tokens."""

    key: str
    train: BlockTable
    held_out: BlockTable
    num_prompts: int
    num_eval: int


@dataclass(frozen=True, kw_only=True)
class Responses:
    """The responses table Y: one row per prompt (`Sampled`), its responses nested."""

    key: str
    table: BlockTable
    num_prompts: int
    num_responses: int


class QueryRow(TypedDict):
    """One chosen response, a row of the query set."""

    ordinal: int
    prompt_id: str
    response_id: str
    prompt: str
    response: str
    token_ids: list[int]


@dataclass(frozen=True, kw_only=True)
class QuerySet:
    """The query set Q: a one-part table of the chosen responses, in the order in which they were picked."""

    key: str
    table: BlockTable

    def rows(self) -> list[QueryRow]:
        """Read the chosen responses."""
        return cast(list[QueryRow], self.table.read(0).to_pylist())


@dataclass(frozen=True, kw_only=True)
class Judgements:
    """The paid judgements E of one round."""

    key: str
    table: BlockTable
    query_set: QuerySet
    """The responses they judge."""

    def all(self) -> list[Judgement]:
        """Read every judgement, abstentions included."""
        return from_table(self.table.read(0), Judgement)

    def scored(self) -> list[Judgement]:
        """Read those with a score; abstentions are never trained on."""
        return [judgement for judgement in self.all() if judgement.status == "scored"]

    def token_ids(self) -> dict[ResponseKey, list[int]]:
        """Read the prompt and response tokens of what was judged."""
        rows = self.query_set.table.read(0).select(["prompt_id", "response", "token_ids"]).to_pylist()
        return {(row["prompt_id"], row["response"]): row["token_ids"] for row in rows}


@dataclass(frozen=True, kw_only=True)
class Preferences:
    """Preference pairs D: a table of `PreferencePair`s."""

    key: str
    table: BlockTable
    num_pairs: int
    comparisons: tuple[BlockTable, ...] = ()
    """What the oracle was asked (tables of `Comparison`s), one table per round; empty for the pairs of a file."""
