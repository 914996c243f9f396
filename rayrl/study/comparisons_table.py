"""Pool of a study that is a table of comparisons: strategies choose among its comparisons, each answered already.

Every comparison of the table is a question of its own, whatever its prompt, since no other pair of that prompt's
responses has an answer. Prompts are held out whole.
"""

# pyarrow has no type stubs.
# pyright: reportMissingTypeStubs=false, reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false

from collections.abc import Container, Iterator, Mapping, Sequence
from itertools import combinations

import pyarrow as pa

from rayrl.config import RunConfig, SeedDataConfig
from rayrl.config.oracle import OracleTable
from rayrl.data.reading import read_seed_rows
from rayrl.data.tokenizing import load_tokenizer, renderer_of
from rayrl.errors import DataError
from rayrl.oracles.replay import key_of, read_answers
from rayrl.study.pool import STRIDE

Texts = tuple[str, list[str]]
"""A prompt, and its different responses."""


def table_of(config: RunConfig) -> OracleTable | None:
    """Return the table of comparisons that the oracle answers from; None if it answers otherwise."""
    return next((table for table in config.oracle.tables() if table.holds == "comparisons"), None)


def pool_settings(table: OracleTable) -> list[tuple[str, object]]:
    """Return the settings of a run whose pool is the responses of a table, and which samples and asks nothing."""
    prompt, first, second, *_ = table.columns
    place = {"path": table.path, "encoding": table.encoding, "prompt_column": prompt, "messages_column": None}
    place |= {"input_column": "", "limit": None, "on_bad_row": "drop"}
    return [
        ("pipeline", "rlp"),
        ("generate.source", "seed"),
        ("generate.max_tokens", 1),
        ("seed_data", place | {"response_column": first, "score_column": None, "min_score": None}),
        ("pool", place | {"num_eval": 1}),
        ("preferences", {"source": "data", "data": place | {"chosen_column": first, "rejected_column": second}}),
        ("select.strategy", "random"),
        ("evaluate.budget", 0),
        ("evaluate.diagnosis_budget", 0),
        ("evaluate.reference_answers", None),
    ]


def seed_tables(config: RunConfig, table: OracleTable) -> list[SeedDataConfig]:
    """Return the responses of both columns of the table, as seed data."""
    assert config.seed_data is not None, "the pool of a table has seed data"
    settings = config.seed_data.model_dump()
    return [SeedDataConfig.model_validate(settings | {"response_column": column}) for column in table.columns[1:3]]


def texts_of(config: RunConfig, table: OracleTable) -> dict[str, Texts]:
    """Read the prompts of the table with their different responses, by the prompt's id."""
    render = renderer_of(load_tokenizer(config.policy), config.policy)
    found: dict[str, Texts] = {}
    for seed_data in seed_tables(config, table):
        for prompt, text in read_seed_rows(seed_data, render):
            _, texts = found.setdefault(prompt.id, (prompt.text, []))
            if text not in texts:
                texts.append(text)
    return found


def num_comparisons(texts: Mapping[str, Texts], table: OracleTable) -> dict[str, int]:
    """Count the comparisons of the table, by the id of their prompt."""
    answered = read_answers(table).by_question
    counts = {prompt_id: len(list(_answered(*each, answered))) for prompt_id, each in texts.items()}
    return {prompt_id: num for prompt_id, num in counts.items() if num}


def pool_of_comparisons(pool: pa.Table, table: OracleTable) -> pa.Table:
    """Make a pool of comparisons of a pool of responses: two rows each, and `id // STRIDE` is a comparison's number.

    Raises:
        DataError: the table has fewer than two comparisons of the pool's responses.
    """
    answered = read_answers(table).by_question
    rows_of: dict[str, list[int]] = {}
    for row, prompt_id in enumerate(pool["prompt_id"].to_pylist()):
        rows_of.setdefault(prompt_id, []).append(row)
    prompts, responses = pool["prompt"].to_pylist(), pool["response"].to_pylist()
    compared: list[int] = []
    for rows in rows_of.values():
        for first, second in _answered(prompts[rows[0]], [responses[row] for row in rows], answered):
            compared += [rows[first], rows[second]]
    if len(compared) < 4:
        raise DataError(
            f"{table.setting} {table.path} must hold two comparisons or more of the responses in the pool, got "
            f"{len(compared) // 2}; name the table that was made of them"
        )
    ids = [place // 2 * STRIDE + place % 2 for place in range(len(compared))]
    return pool.take(compared).set_column(0, pool.schema.field("id"), pa.array(ids, pa.int64()))


def _answered(prompt: str, texts: Sequence[str], answered: Container[str]) -> Iterator[tuple[int, int]]:
    """Yield the places of the responses to a prompt that the table compares."""
    for first, second in combinations(range(len(texts)), 2):
        one, other = texts[first], texts[second]
        if key_of(prompt, one, other) in answered or key_of(prompt, other, one) in answered:
            yield first, second
