"""Data settings: the files and data sets that a run reads prompts, seed data and reference answers from."""

from typing import Annotated, Literal

from pydantic import AfterValidator, Field, model_validator

from rayrl.config.table import Place, Table


def _known(encoding: str) -> str:
    try:
        "".encode(encoding)
    except LookupError:
        known = 'such as "utf-8" or "cp1252"'
        raise ValueError(f'must be an encoding of text that Python knows, {known}, got "{encoding}"') from None
    return encoding


Encoding = Annotated[str, AfterValidator(_known)]
"""An encoding of text by its name in Python, such as "cp1252" or "utf-16"."""


class DataConfig(Table):
    """Prompts: a file or a pattern of files (JSONL, JSON, CSV, TSV, Parquet, Arrow; gz, zst, bz2, xz), a folder of
    them or of `save_to_disk`, or a hub name. Only the columns that are named here are read.
    """

    path: Place
    """A local path, an fsspec URL, a pattern such as `shards/part-*.jsonl`, or a hub name (`name:configuration` if the
    data set has several)."""
    split: str = "train"
    """Split of a folder or data set; ignored for files."""
    encoding: Encoding = "utf-8"
    """Encoding of text files."""
    prompt_column: str = "prompt"
    """A column of texts that are what is asked."""
    input_column: str | None = None
    """A column of texts, such as Dolly's `context`, that follow the prompt after a blank line where they are not empty.
    By default Alpaca's `input` if `prompt_column` is `instruction` and the file has it; "" is no column."""
    messages_column: str | None = None
    """A column of chats in any shape that `rayrl.data.chats` reads; replaces `prompt_column`. Policy, oracle and
    evaluator read the whole chat, without the assistant's turn at its end."""
    limit: int | None = Field(default=None, gt=0)
    """Use only the first `limit` rows."""
    on_bad_row: Literal["refuse", "drop"] = "refuse"
    """A row that cannot be used, of a broken line, a cell of the wrong type, a chat that the policy's template refuses,
    or (in the pool) a prompt that fills the context: "refuse" names it and stops, "drop" leaves it out and counts."""


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
    """A column of texts, or of chats whose last answer counts."""
    order: Literal["both", "random"] = "random"
    """Order in which an oracle that compares reads an answer and the reference: "random" is one drawn order, recorded;
    "both" is two queries, and a disagreement between them is a tie."""
