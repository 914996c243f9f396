"""Pool of a study of labels: responses with their vectors, made once and shared by all cells.

The base config's own stages sample and embed it, or a table brings it ready. It is kept as one Parquet file, named by
all that decides it, so that a study which goes on starts no engine.
"""

# pyarrow has no type stubs.
# pyright: reportMissingTypeStubs=false, reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false

import io
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from jaxtyping import Bool, Float32, Int64

from rayrl.config import RunConfig
from rayrl.data.cells import text_cell
from rayrl.data.rows import read_rows
from rayrl.errors import DataError
from rayrl.records import content_id, drawn_seed
from rayrl.runs import storage
from rayrl.runs.content import Input, content_of, contents_of
from rayrl.study.config import VECTOR_SETTINGS, Asks, StudyConfig, VectorsConfig

STRIDE = 1 << 20
"""`id // STRIDE` is the number of a response's prompt; of its comparison where a table of comparisons is the pool."""
TABLES = ("seed", "device", "policy", "seed_data", "pool", "sft", "generate", "rubric", "generators", "embedders")
"""Tables and settings of a run that decide its responses and their vectors, with `VECTOR_SETTINGS` of `select`."""
SCHEMA = pa.schema(
    [
        pa.field("id", pa.int64(), nullable=False),
        *(pa.field(name, pa.string(), nullable=False) for name in ("prompt_id", "response_id", "prompt", "response")),
        pa.field("vector", pa.list_(pa.field("item", pa.float32(), nullable=False)), nullable=False),
    ]
)


@dataclass(frozen=True)
class StudyPool:
    """Responses with their vectors. Travels to the cells: arrays in Ray's object store are shared, not copied."""

    key: str
    """Names all that decides it."""
    ids: Int64[np.ndarray, " n"]
    vectors: Float32[np.ndarray, "n d"]
    lengths: Int64[np.ndarray, " n"]
    """Of the responses, in characters."""
    prompt_ids: tuple[str, ...]
    """By `id // STRIDE`."""
    is_repeat: Bool[np.ndarray, " n"] | None = None
    """Rows of a response that an earlier row has, since it is in several comparisons; None is none of them."""

    @cached_property
    def prompts(self) -> Int64[np.ndarray, " n"]:
        """Number of each response's prompt: the first that the prompt has."""
        first: dict[str, int] = {}
        numbers = np.array([first.setdefault(prompt_id, n) for n, prompt_id in enumerate(self.prompt_ids)], np.int64)
        return numbers[self.ids // STRIDE]

    def held_out(self, share: float, seed: int) -> Bool[np.ndarray, " n"]:
        """Tell of each response whether its prompt is held out."""
        numbers = np.unique(self.prompts)
        held_out = held_out_prompts([self.prompt_ids[number] for number in numbers], share, seed)
        return np.isin(self.prompts, [number for number in numbers if self.prompt_ids[number] in held_out])

    def sizes(self) -> dict[str, list[int]]:
        """Count the responses that go together, by the id of their prompt: all of it, or two of each comparison."""
        sizes: dict[str, list[int]] = {}
        for number, size in zip(*np.unique(self.ids // STRIDE, return_counts=True), strict=True):
            sizes.setdefault(self.prompt_ids[number], []).append(int(size))
        return sizes

    def questions(self, rows: Int64[np.ndarray, " m"], asks: Asks) -> Int64[np.ndarray, "q u"]:
        """Return the ids of the questions by which some responses are labelled: each, or disjoint pairs of them.

        Pairs are of one prompt, in an order that is drawn once for all cells, so that these ask the same ones.
        """
        if asks == "responses":
            return self.ids[rows, None]
        drawn = np.random.default_rng(drawn_seed("disjoint pairs")).random(len(self.ids))
        order = rows[np.lexsort((drawn[rows], self.ids[rows] // STRIDE))]
        _, starts, counts = np.unique(self.ids[order] // STRIDE, return_index=True, return_counts=True)
        place, size = np.arange(len(order)) - np.repeat(starts, counts), np.repeat(counts, counts)
        first = np.flatnonzero((place % 2 == 0) & (place + 1 < size))
        return np.sort(self.ids[np.stack([order[first], order[first + 1]], axis=1)], axis=1)


@dataclass(frozen=True, kw_only=True)
class PoolCounts:
    """Numbers of questions that a pool has."""

    num_responses: int
    num_questions: int
    """Of everything: single responses, or disjoint pairs."""
    num_possible: int
    """Different questions that there are: single responses, or all pairs of a prompt."""
    num_choosable: int
    """Questions that a strategy may choose with each seed, none of them about a held-out prompt."""
    num_held_out: int
    """Questions of the held-out prompts of a seed, at most."""


def pool_counts(sizes: Mapping[str, Sequence[int]], splits: Sequence[set[str]], asks: Asks) -> PoolCounts:
    """Count the questions of a pool with these sizes (see `StudyPool.sizes`) and held-out prompts of each split."""
    of_responses = asks == "responses"

    def count(questions: Callable[[int], int], but: Container[str] = ()) -> int:
        return sum(questions(size) for prompt_id, each in sizes.items() if prompt_id not in but for size in each)

    def everything(size: int) -> int:
        return size if of_responses else size // 2

    num_questions = count(everything)
    return PoolCounts(
        num_responses=count(lambda size: size),
        num_questions=num_questions,
        num_possible=count(lambda size: size if of_responses else size * (size - 1) // 2),
        num_choosable=min(count(lambda size: size if of_responses else int(size > 1), but) for but in splits),
        num_held_out=num_questions - min(count(everything, but) for but in splits),
    )


def held_out_prompts(prompt_ids: Sequence[str], share: float, seed: int) -> set[str]:
    """Draw the prompts that are held out, at least one and not all: ids and seed decide, not the order."""
    drawn = sorted(prompt_ids, key=lambda prompt_id: content_id("held out of a study", str(seed), prompt_id))
    return set(drawn[: min(max(1, round(share * len(drawn))), len(drawn) - 1)])


def study_pool(key: str, table: pa.Table) -> StudyPool:
    """Make the pool of a table of `SCHEMA`."""
    ids = table["id"].to_numpy()
    numbers = ids // STRIDE
    prompt_ids = [""] * (int(numbers.max()) + 1)
    for number, prompt_id in zip(numbers, table["prompt_id"].to_pylist(), strict=True):
        prompt_ids[number] = prompt_id
    flat = table["vector"].combine_chunks().flatten().to_numpy(zero_copy_only=False)
    seen: set[tuple[str, str]] = set()
    is_repeat: list[bool] = []
    for response in zip(table["prompt_id"].to_pylist(), table["response_id"].to_pylist(), strict=True):
        is_repeat.append(response in seen)
        seen.add(response)
    return StudyPool(
        key=key,
        ids=ids,
        vectors=flat.reshape(len(ids), -1),
        lengths=pc.utf8_length(table["response"]).to_numpy().astype(np.int64),  # type: ignore[attr-defined]
        prompt_ids=tuple(prompt_ids),
        is_repeat=np.array(is_repeat) if any(is_repeat) else None,
    )


def pool_key(study: StudyConfig, config: RunConfig) -> str:
    """Name a pool by all that decides it: settings, and the content of the files and models that they name."""
    if study.vectors is not None:
        return content_id("vectors", study.vectors.science_json(), _content(study.vectors))
    science = config.science()
    select = {name: science["select"][name] for name in VECTOR_SETTINGS}
    parts = [f"{name}={science[name]!r}" for name in TABLES] + [f"select={select!r}"]
    contents = contents_of(config, {})
    prefixes = (*(f"{name}." for name in TABLES), "select.")
    parts += [f"{setting} {contents[setting]}" for setting in sorted(contents) if setting.startswith(prefixes)]
    return content_id("pool", *parts)


def _content(vectors: VectorsConfig) -> str:
    """Return the digest of local files; of remote ones of their marks, such as an ETag, and of the hub's its commit."""
    return content_of(Input(setting="vectors.path", place=vectors.path, kind="data")) or ""


def pool_place(study: StudyConfig, key: str) -> str:
    """Locate the file of a pool."""
    return storage.join(storage.absolute(study.study_dir), "pools", f"{key}.parquet")


def read_pool_table(study: StudyConfig, key: str) -> pa.Table | None:
    """Read the table of a pool; None if it has not been made."""
    place = pool_place(study, key)
    return pq.read_table(io.BytesIO(storage.read_bytes(place))) if storage.exists(place) else None


def write_pool_table(study: StudyConfig, key: str, table: pa.Table) -> None:
    """Keep the table of a pool."""
    sink = io.BytesIO()
    pq.write_table(table, sink, compression="zstd")
    storage.write_bytes(pool_place(study, key), sink.getvalue())


def read_vectors(vectors: VectorsConfig) -> pa.Table:
    """Read a pool that comes with its vectors.

    Repeated rows are one response.

    Raises:
        DataError: missing, malformed, without a column, a row without text or numbers, or vectors of two widths.
    """
    columns = [vectors.prompt_column, vectors.response_column, vectors.vector_column]
    rows: list[dict[str, object]] = []
    numbers: dict[str, int] = {}
    seen: dict[int, set[str]] = {}
    width: int | None = None
    for row in read_rows(vectors.path, columns):
        prompt = text_cell(row.cells.get(columns[0]), columns[0], row.where)
        response = text_cell(row.cells.get(columns[1]), columns[1], row.where)
        vector = _vector_cell(row.cells.get(columns[2]), columns[2], row.where)
        width = len(vector) if width is None else width
        if len(vector) != width:
            raise DataError(
                f"{row.where}: column {columns[2]} must hold vectors of one width in all rows, {width} in the first, "
                f"got {len(vector)}; embed all responses with one model"
            )
        number = numbers.setdefault(prompt, len(numbers))
        responses = seen.setdefault(number, set())
        if response in responses:
            continue
        rows.append(
            {
                "id": number * STRIDE + len(responses),
                "prompt_id": content_id(prompt),
                "response_id": f"{content_id(prompt)}-{len(responses)}",
                "prompt": prompt,
                "response": response,
                "vector": vector,
            }
        )
        responses.add(response)
    if len(numbers) < 2:
        raise DataError(f"vectors.path {vectors.path} must hold two prompts or more, got {len(numbers)}; add rows")
    return pa.Table.from_pylist(rows, schema=SCHEMA)


def _vector_cell(cell: object, column: str, where: str) -> list[float]:
    if not isinstance(cell, list | tuple | np.ndarray) or not len(cell):
        raise DataError(f"{where}: column {column} must hold a list of numbers, got {cell!r:.60}; name another column")
    try:
        vector = [float(number) for number in cell]
    except (TypeError, ValueError):
        raise DataError(f"{where}: column {column} must hold a list of numbers, got {cell!r:.60}") from None
    if not np.isfinite(vector).all():
        raise DataError(f"{where}: column {column} must hold finite numbers, got {cell!r:.60}; mend that row")
    return vector


def refuse_small_pool(study: StudyConfig, num_choosable: int, *, is_exact: bool) -> None:
    """Refuse a budget that is larger than what labels may be chosen from.

    Raises:
        DataError: names the budget and the number of responses.
    """
    if study.budgets[-1] > num_choosable:
        kept = "" if is_exact else "at most "
        chosen = "responses" if study.asks == "responses" else "pairs of responses, one of a prompt or of a comparison,"
        raise DataError(
            f"budgets must be at most the number of {chosen} that labels are chosen from, {kept}{num_choosable:,} "
            f"(held_out = {study.held_out:g} of the prompts are kept for the comparison), got {study.budgets[-1]:,}; "
            "leave it out, add prompts, or lower held_out"
        )
