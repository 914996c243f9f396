"""Artifacts that stages hand to each other: keys and tables, never rows."""

from dataclasses import dataclass

from rayrl.data.blocks import BlockTable
from rayrl.records import Judgement, Said, from_table


@dataclass(frozen=True, kw_only=True)
class Pool:
    """The unlabelled prompts X and the held-out ones, both with tokens."""

    key: str
    train: BlockTable
    held_out: BlockTable
    num_prompts: int
    num_eval: int


@dataclass(frozen=True, kw_only=True)
class Responses:
    """The responses table Y: one row per prompt (`Sampled`), k responses nested."""

    key: str
    table: BlockTable
    num_prompts: int
    num_responses: int
    block_counts: list[int]
    """Responses per block."""


@dataclass(frozen=True, kw_only=True)
class QuerySet:
    """The query set Q: a one-part table of the chosen responses, in the order they were picked."""

    key: str
    table: BlockTable


@dataclass(frozen=True, kw_only=True)
class Judgements:
    """The paid judgements E of one round."""

    key: str
    table: BlockTable
    asked: BlockTable
    """The query set they answer."""

    def all(self) -> list[Judgement]:
        """Abstentions included."""
        return from_table(self.table.read(0), Judgement)

    def scored(self) -> list[Judgement]:
        """Those with a score; abstentions are never trained on."""
        return [j for j in self.all() if j.status == "scored"]

    def token_ids(self) -> dict[Said, list[int]]:
        """Prompt and response tokens of what was judged."""
        rows = self.asked.read(0).select(["prompt_id", "response", "token_ids"]).to_pylist()
        return {(row["prompt_id"], row["response"]): row["token_ids"] for row in rows}


@dataclass(frozen=True, kw_only=True)
class Preferences:
    """D: a table of `PreferencePair`s."""

    key: str
    table: BlockTable
    num_pairs: int
    compared: tuple[BlockTable, ...] = ()
    """What the expert was asked (`Comparison`s), round by round."""
