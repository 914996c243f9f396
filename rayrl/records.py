"""Records that flow through a run, and their Arrow schemas.

    Prompt -> Sampled(prompt, responses) -> Judgement or Comparison -> PreferencePair

A judgement or comparison is one record from question to loss: a stage builds it with the status "asked", and the
oracle pool gives it back answered. The schema of a table is derived from the record class (`arrow_schema`), so that
rows and tables cannot differ. Tables are folders of Parquet parts. A part holds a fixed block of prompts, one row per
prompt with its responses nested, so that no stage ever needs a groupby.
"""

# pyarrow has no type stubs.
# pyright: reportMissingTypeStubs=false, reportUnknownMemberType=false, reportUnknownParameterType=false
# pyright: reportUnknownVariableType=false, reportUnknownArgumentType=false

import hashlib
import math
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import Field, dataclass, fields, is_dataclass, replace
from functools import cache
from typing import Any, ClassVar, Literal, Protocol, TypeVar

import pyarrow as pa

Status = Literal["asked", "scored", "abstained"]
Preference = Literal["first", "second", "tie"]
Row = dict[str, Any]
"""A record as a row of a table: Arrow's values, by column."""
ResponseKey = tuple[str, str]
"""Prompt id and text of a response. Response ids repeat from round to round; equal texts are equal responses."""


class Record(Protocol):
    """Any dataclass, of this module or of another one."""

    __dataclass_fields__: ClassVar[dict[str, Field[Any]]]


R = TypeVar("R", bound=Record)


def content_id(*parts: str) -> str:
    """Hash some texts to an id of 16 digits: equal texts have equal ids."""
    digest = hashlib.blake2b(digest_size=8)
    for part in parts:
        encoded = part.encode()
        # The length goes first, so that ("ab", "c") and ("a", "bc") differ.
        digest.update(len(encoded).to_bytes(8, "little") + encoded)
    return digest.hexdigest()


def drawn_seed(*parts: str) -> int:
    """A seed (63 bits) that follows from some text."""
    # 63 bits: vLLM and torch take signed seeds.
    return int(content_id(*parts), 16) >> 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """Weights that can be served or trained from."""

    path: str
    """A Hugging Face model folder (any fsspec URL) or a hub id."""
    version: str
    """Names the weights: equal versions are equal weights."""
    revision: str | None = None
    """Of a hub id; None of a folder, and for the hub's newest."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """One prompt of the pool."""

    id: str
    """`content_id` of the rendered text: equal prompts are one prompt."""
    text: str
    """The whole conversation as plain text: the user's only message, or a transcript with its system prompt, earlier
    turns and tool calls (`rayrl.data.chats.conversation_text`). Judges, evaluators and reports read this."""
    rendered: str
    """What the policy reads: the plain text itself, or the chat template applied to the messages. Control tokens inside
    the texts are marked (`rayrl.data.control_tokens`)."""


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
    """`Checkpoint.version` of the weights that wrote it."""
    logprob: float
    """Sum over `token_ids` of log p(token | prefix) at temperature 1, nats."""
    finish_reason: str
    """"stop" or "length", or "data" for a response that came with the seed data."""
    num_samples: int = 1
    """Samples of this prompt with exactly this text; only the first of them is kept."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Scored:
    """A response to be scored by an evaluator or a reward model."""

    prompt: str
    response: str
    token_ids: list[int]
    """Prompt and response, as the policy read and wrote them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampled:
    """A prompt with its k responses: one row of the responses table."""

    prompt_id: str
    prompt: str
    """`Prompt.text`: the whole conversation. So it is in all records below."""
    prompt_token_ids: list[int]
    """Tokens of `Prompt.rendered`: what the policy was conditioned on."""
    responses: list[Response]
    num_empty: int = 0
    """Samples dropped because they were empty."""
    num_duplicates: int = 0
    """Samples dropped because an earlier one of this prompt has the same text."""

    def items(self) -> list[Scored]:
        """List the responses, in order, as an evaluator or a reward model reads them."""
        return [
            Scored(prompt=self.prompt, response=response.text, token_ids=self.prompt_token_ids + response.token_ids)
            for response in self.responses
        ]


@dataclass(frozen=True, slots=True, kw_only=True)
class HeldOutAnswer:
    """A response of a policy in training to a held-out prompt, with its reward."""

    prompt_id: str
    prompt: str
    prompt_token_ids: list[int]
    response: str
    token_ids: list[int]
    reward: float | None

    def as_item(self) -> Scored:
        """Return the answer as evaluators and reward models read it."""
        return Scored(prompt=self.prompt, response=self.response, token_ids=self.prompt_token_ids + self.token_ids)


@dataclass(frozen=True, slots=True, kw_only=True)
class Judgement:
    """A question to the oracle about one response, and then its answer.

    A stage fills in the ids and texts; the pool adds the rest. An abstention has no score, and is never trained on.
    """

    key: str = ""
    """content_id(conversation, response, oracle, version of the rubric): a judgement once paid is never paid again."""
    prompt_id: str
    response_id: str
    prompt: str
    response: str
    oracle: str = ""
    """`Oracle.name`."""
    status: Status = "asked"
    score: float | None = None
    """On the rubric's scale; a number if and only if the status is "scored"."""
    rationale: str = ""
    """The oracle's reasons, or why it abstained."""
    purpose: str = ""
    """The budget that the question was put under: "label", "evaluate" or "test"."""
    cost_usd: float | None = 0.0
    """0 where the answer was paid for by an earlier question with the same key; None where there is no price."""

    @property
    def response_key(self) -> ResponseKey:
        """Identify the response that is judged, whatever round it is from."""
        return self.prompt_id, self.response


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """A question to the oracle about two responses, in the order in which it reads them, and then its answer.

    Filled in like a `Judgement`.
    """

    key: str = ""
    """content_id(prompt, first, second, oracle, version of the rubric): the other order is another question."""
    prompt_id: str
    first_id: str
    """`Response.id`."""
    second_id: str
    prompt: str
    first: str
    second: str
    oracle: str = ""
    """`Oracle.comparer`."""
    status: Status = "asked"
    preference: Preference | None = None
    """The better response; one of the three words if and only if the status is "scored"."""
    rationale: str = ""
    """The oracle's reasons, or why it abstained."""
    purpose: str = ""
    """The budget that the question was put under: "label", "evaluate" or "test"."""
    cost_usd: float | None = 0.0
    """0 where the answer was paid for by an earlier question with the same key; None where there is no price."""

    def turned(self) -> "Comparison":
        """Swap the two responses of a comparison that is not answered yet."""
        assert self.status == "asked", "an answer is about one order only"
        return replace(self, first_id=self.second_id, second_id=self.first_id, first=self.second, second=self.first)


@dataclass(frozen=True, slots=True, kw_only=True)
class PreferencePair:
    """Two responses that a policy or a reward model is trained on. Training knows their origin only as `source`."""

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
    NaN where another policy wrote them."""
    rejected_reference_logprob: float
    source: str
    """What the preference is from: scores of the "evaluator", of the "oracle" or of both ("mixed"), a comparison by the
    "oracle", or a file of pairs ("data")."""

    @classmethod
    def of_responses(
        cls,
        row: Row,
        chosen: Row,
        rejected: Row,
        *,
        source: str,
        scores: tuple[float, float] = (math.nan, math.nan),
    ) -> "PreferencePair":
        """Pair two responses of a row of a responses table.

        Args:
            row: a `Sampled`.
            chosen: a `Response` of it.
            rejected: another one.
            source: see the field.
            scores: of the chosen one and of the rejected one.
        """
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


_ARROW: dict[object, pa.DataType] = {str: pa.string(), int: pa.int64(), float: pa.float64(), bool: pa.bool_()}


def _arrow_type(annotation: object) -> tuple[pa.DataType, bool]:
    """Arrow type of a field annotation, and whether it may be null."""
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Literal:
        return pa.string(), False
    if origin in (types.UnionType, typing.Union):
        # The only unions of the records are of a type with None.
        (inner,) = [arg for arg in args if arg is not type(None)]
        return _arrow_type(inner)[0], True
    if origin is list:
        return pa.list_(pa.field("item", _arrow_type(args[0])[0], nullable=False)), False
    if isinstance(annotation, type) and is_dataclass(annotation):
        return pa.struct(list(arrow_schema(annotation))), False
    return _ARROW[annotation], False


def arrow_schema(record: type[Record]) -> pa.Schema:
    """Derive the Arrow schema of a record class: a column per field, nullable only where the type allows None."""
    hints = typing.get_type_hints(record)
    columns: list[pa.Field] = []
    for field in fields(record):
        arrow, nullable = _arrow_type(hints[field.name])
        columns.append(pa.field(field.name, arrow, nullable=nullable))
    return pa.schema(columns)


def to_table(records: Iterable[Record], record: type[Record]) -> pa.Table:
    """Make an Arrow table of exactly the class's schema, empty tables included."""
    return pa.Table.from_pylist([to_row(each) for each in records], schema=arrow_schema(record))


def to_row(record: Record) -> Row:
    """Turn a record into a table row, nested records included. Lists of numbers are the record's own, not copies."""
    row: Row = {}
    for name, nested in _columns(type(record)).items():
        value = getattr(record, name)
        row[name] = value if nested is None else [to_row(item) for item in value]
    return row


def from_row(row: Mapping[str, Any], record: type[R]) -> R:
    """Turn a table row into a record, nested records included."""
    values = dict(row)
    for name, nested in _columns(record).items():
        if nested is not None:
            values[name] = [from_row(item, nested) for item in row[name]]
    return record(**values)


# Cached, since reading type hints takes longer than turning a whole row.
@cache
def _columns(record: type[Record]) -> dict[str, type[Record] | None]:
    """The fields of a record class, and where one is a list of records, their class."""
    columns: dict[str, type[Record] | None] = {}
    for name, annotation in typing.get_type_hints(record).items():
        inner = typing.get_args(annotation)[0] if typing.get_origin(annotation) is list else None
        columns[name] = inner if isinstance(inner, type) and is_dataclass(inner) else None
    return columns


def from_table(table: pa.Table, record: type[R]) -> list[R]:
    """Read all rows of a table as records."""
    return [from_row(row, record) for row in table.to_pylist()]
