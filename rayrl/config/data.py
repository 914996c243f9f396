"""Data settings: the files and data sets that a run reads prompts, seed data and reference answers from."""

from typing import Literal

from pydantic import Field, model_validator

from rayrl.config.table import Place, Table


class DataConfig(Table):
    """A file or data set of prompts: JSONL, JSON, CSV, Parquet (gzip'd too), a `save_to_disk` folder or a hub name."""

    path: Place
    """A local path, an fsspec URL, or a hub name (`name:configuration` if the data set has several)."""
    split: str = "train"
    """Split of a data set; ignored for files."""
    prompt_column: str = "prompt"
    messages_column: str | None = None
    """A column of chats in any shape that `rayrl.data.chats` reads; replaces `prompt_column`. Policy, oracle and
    evaluator read the whole chat, without the assistant's turn at its end."""
    limit: int | None = Field(default=None, gt=0)
    """Use only the first `limit` rows."""


class SeedDataConfig(DataConfig):
    """Supervised seed data: prompts with responses."""

    response_column: str = "response"
    """Ignored with `messages_column`: there the assistant's turn at the end is the response, and with
    `sft.turns = "all"` SFT learns from its earlier turns too."""
    score_column: str | None = None
    """A column of numbers to filter rows by."""
    min_score: float | None = None
    """With `score_column`: keep only rows that score at least this (the paper's M1 is trained on high-reward rows)."""

    @model_validator(mode="after")
    def _score_needs_column(self) -> "SeedDataConfig":
        if (self.score_column is None) != (self.min_score is None):
            raise ValueError("score_column and min_score go together: set both or neither")
        return self


class PoolConfig(DataConfig):
    """The pool of unlabelled prompts, and the number of them that are held out for evaluation."""

    num_eval: int = Field(default=64, ge=0)
    """Prompts held out of the pool, chosen by the run's seed, for `evaluate`."""


class ReferenceAnswersConfig(DataConfig):
    """A fixed table of reference answers that all policies compete with."""

    response_column: str = "response"
    order: Literal["both", "random"] = "random"
    """Order in which an oracle that compares reads an answer and the reference: "random" is one drawn order, recorded;
    "both" is two queries, and a disagreement between them is a tie."""
