"""The records that flow through a run, and their Arrow schemas.

    Prompt -> Sampled(prompt, responses) -> Judgement or Comparison -> PreferencePair

A row and a table never drift apart: `arrow_schema(Record)` derives the table's schema from the dataclass. Tables are
folders of Parquet parts; a part holds a fixed block of prompts, one row per prompt with its responses nested, so that
no stage ever needs a groupby.
"""

import hashlib
import math
import types
import typing
from dataclasses import asdict, dataclass, fields, is_dataclass
from typing import Any, Literal, TypeVar

import pyarrow as pa

R = TypeVar("R")
Status = Literal["scored", "abstained"]
Preference = Literal["first", "second", "tie"]
Said = tuple[str, str]
"""Prompt id and text of a response. Response ids repeat from round to round; who says the same has said the same."""


def content_id(*parts: str) -> str:
    """A 16-digit id of some text: the same text always has the same id."""
    digest = hashlib.blake2b(digest_size=8)
    for part in parts:
        encoded = part.encode()
        digest.update(len(encoded).to_bytes(8, "little") + encoded)
    return digest.hexdigest()


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """Weights that can be served or trained from."""

    path: str
    """A Hugging Face model folder (any fsspec URL) or a hub id."""
    version: str
    """Names the weights: equal versions are equal weights."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """One prompt of the pool."""

    id: str
    """`content_id` of the rendered text: equal prompts are one prompt."""
    text: str
    """What the user wrote: the plain prompt, or the last user message of a chat. Judges and reports show this."""
    rendered: str
    """What the policy reads: `text` itself, or the chat template applied to the messages."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Response:
    """One sampled continuation of a prompt, with all that is needed to sample it again."""

    id: str
    """`<prompt id>-<index>`; unique within a round."""
    text: str
    token_ids: list[int]
    """Exactly what the policy emitted, the end-of-sequence token included."""
    seed: int
    """Seed of this response's own random stream."""
    policy_version: str
    """Which weights spoke: the `version` of a `ServedModel`."""
    logprob: float
    """Sum over `token_ids` of log p(token | prefix) at temperature 1, nats."""
    finish_reason: str
    """"stop" or "length", or "data" for a response that came with the seed data."""
    num_samples: int = 1
    """Samples of this prompt that say exactly this; the first of them is kept."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampled:
    """A prompt with its k responses: one row of the responses table."""

    prompt_id: str
    prompt: str
    """`Prompt.text`."""
    prompt_token_ids: list[int]
    """Tokens of `Prompt.rendered`: what the policy was conditioned on."""
    responses: list[Response]
    num_empty: int = 0
    """Samples dropped because nothing was said."""
    num_duplicates: int = 0
    """Samples dropped because an earlier one of this prompt says the same."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Scored:
    """A response to be scored by an evaluator or a reward model."""

    prompt: str
    response: str
    token_ids: list[int]
    """Prompt and response, as the policy read and wrote them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HeldOutAnswer:
    """What a policy in training said to a held-out prompt, and what its reward made of it."""

    prompt_id: str
    prompt: str
    prompt_token_ids: list[int]
    response: str
    token_ids: list[int]
    reward: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Judgement:
    """One pointwise verdict of the expert. An abstention has no score: it is never trained on."""

    key: str
    """content_id(prompt, response, oracle, rubric): a judgement once paid is never paid again."""
    prompt_id: str
    response_id: str
    prompt: str
    response: str
    oracle: str
    status: Status
    score: float | None
    """On the rubric's scale; None if and only if abstained."""
    rationale: str
    """The expert's reasons, or why it abstained."""
    purpose: str
    """"label" (the query budget) or "evaluate" (the evaluation budget)."""
    cost_usd: float

    @property
    def said(self) -> Said:
        """What was judged."""
        return self.prompt_id, self.response


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """One pairwise verdict of the expert, on two responses in the order in which it read them."""

    key: str
    """content_id(prompt, first, second, oracle, rubric): the other order is another question."""
    prompt_id: str
    first_id: str
    """`Response.id`."""
    second_id: str
    prompt: str
    first: str
    second: str
    oracle: str
    status: Status
    preference: Preference | None
    """Which response is better; None if and only if abstained."""
    rationale: str
    """The expert's reasons, or why it abstained."""
    purpose: str
    """"label" (the query budget) or "evaluate" (the evaluation budget)."""
    cost_usd: float


@dataclass(frozen=True, slots=True, kw_only=True)
class PreferencePair:
    """What the policy is trained on. Training never sees who labelled it, except as `source`."""

    prompt_id: str
    prompt: str
    prompt_token_ids: list[int]
    chosen_id: str
    """`Response.id`."""
    rejected_id: str
    chosen: str
    rejected: str
    chosen_token_ids: list[int]
    rejected_token_ids: list[int]
    chosen_score: float
    """NaN, like the rejected one's, where only the preference is known."""
    rejected_score: float
    chosen_reference_logprob: float
    """Sum of log p of the chosen tokens under the policy that the round began with, M1 in the first; from generation.
    NaN where it did not write them."""
    rejected_reference_logprob: float
    source: str
    """Who scored the two responses ("evaluator", "expert" or "mixed"), or who preferred one: "data" or "oracle"."""

    @classmethod
    def of_responses(
        cls,
        row: dict[str, Any],
        chosen: dict[str, Any],
        rejected: dict[str, Any],
        *,
        source: str,
        scores: tuple[float, float] = (math.nan, math.nan),
    ) -> "PreferencePair":
        """Two `Response`s of a row of a responses table; `scores` are the chosen one's and the rejected one's."""
        return cls(
            prompt_id=row["prompt_id"],
            prompt=row["prompt"],
            prompt_token_ids=row["prompt_token_ids"],
            chosen_id=chosen["id"],
            rejected_id=rejected["id"],
            chosen=chosen["text"],
            rejected=rejected["text"],
            chosen_token_ids=chosen["token_ids"],
            rejected_token_ids=rejected["token_ids"],
            chosen_score=scores[0],
            rejected_score=scores[1],
            chosen_reference_logprob=chosen["logprob"],
            rejected_reference_logprob=rejected["logprob"],
            source=source,
        )


_ARROW: dict[Any, pa.DataType] = {str: pa.string(), int: pa.int64(), float: pa.float64(), bool: pa.bool_()}


def _arrow_type(annotation: Any) -> tuple[pa.DataType, bool]:
    """Arrow type of a field annotation, and whether it may be null."""
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Literal:
        return pa.string(), False
    if origin in (types.UnionType, typing.Union):
        (inner,) = (a for a in args if a is not type(None))
        return _arrow_type(inner)[0], True
    if origin is list:
        return pa.list_(pa.field("item", _arrow_type(args[0])[0], nullable=False)), False
    if isinstance(annotation, type) and is_dataclass(annotation):
        return pa.struct(list(arrow_schema(annotation))), False
    return _ARROW[annotation], False


def arrow_schema(record: type) -> pa.Schema:
    """The Arrow schema of a record class: one non-null column per field, nullable only where the type allows None."""
    hints = typing.get_type_hints(record)
    columns = []
    for field in fields(record):
        arrow, nullable = _arrow_type(hints[field.name])
        columns.append(pa.field(field.name, arrow, nullable=nullable))
    return pa.schema(columns)


def to_table(records: typing.Sequence[Any], record: type) -> pa.Table:
    """Records as an Arrow table of exactly the class's schema, empty tables included."""
    return pa.Table.from_pylist([asdict(r) for r in records], schema=arrow_schema(record))


def from_row(row: dict[str, Any], record: type[R]) -> R:
    """One table row back as a record, nested records included."""
    hints = typing.get_type_hints(record)
    values = dict(row)
    for name, annotation in hints.items():
        if typing.get_origin(annotation) is list:
            (inner,) = typing.get_args(annotation)
            if isinstance(inner, type) and is_dataclass(inner):
                values[name] = [from_row(item, inner) for item in row[name]]
    return record(**values)


def from_table(table: pa.Table, record: type[R]) -> list[R]:
    """All rows of a table as records."""
    return [from_row(row, record) for row in table.to_pylist()]
