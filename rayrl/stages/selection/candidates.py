"""Stages candidates and seed_responses: the responses that the oracle may be asked about.

They are M1's own or, as the off-policy control, those of the seed data. In either case the evaluator labels M1's
responses, and the policy is trained on those. In a later round, responses that were judged already are left out.
"""

import math
import time
from collections.abc import Sequence
from functools import partial
from itertools import chain

import pyarrow as pa

from rayrl.config import RunConfig, SeedDataConfig
from rayrl.data.blocks import BlockTable, map_blocks
from rayrl.data.reading import read_seed_rows
from rayrl.data.tokenizing import encode_prompt, encode_response, load_tokenizer, renderer_of
from rayrl.records import Response, ResponseKey, Sampled, arrow_schema, to_table
from rayrl.runs.run import Run
from rayrl.runs.stage_metrics import CandidatesMetrics, SeedResponsesMetrics
from rayrl.runs.stage_table import CANDIDATES, SEED_RESPONSES
from rayrl.stages.artifacts import Judgements, Responses

CONCURRENCY = 4
"""Blocks in flight; no fleet is asked, so a few keep the disk busy."""


def candidates(run: Run, responses: Responses, paid: Sequence[Judgements] = ()) -> Responses:
    """Return what may be selected: the policy's responses, or the seed data's, without those judged in `paid`."""
    pool = responses if run.config.generate.source == "policy" else responses_of_seed_data(run)
    return _without_judged(run, pool, paid) if paid else pool


def _without_judged(run: Run, pool: Responses, paid: Sequence[Judgements]) -> Responses:
    """Leave out what the oracle was asked about in earlier rounds, whether it answered or abstained."""
    key = run.key(CANDIDATES, pool.key, *(judgements.key for judgements in paid))
    table = BlockTable(run.folder(CANDIDATES, "table"), pool.table.num_blocks)
    done = run.finished(CANDIDATES, key)
    if done is None:
        started = time.monotonic()
        # By text and not by id: ids of responses repeat from round to round.
        judged = frozenset(judgement.response_key for judgements in paid for judgement in judgements.all())
        counts = map_blocks(
            table,
            partial(unjudged_block, judged, pool.table),
            concurrency=CONCURRENCY,
            describe=lambda block: {"num_responses": sum(map(len, block["responses"].to_pylist()))},
            progress=CANDIDATES.name,
        )
        num_responses = sum(block["num_responses"] for block in counts)
        done = run.finish(
            CANDIDATES,
            key,
            since=started,
            num_rows=pool.num_prompts,
            metrics=CandidatesMetrics(num_responses=num_responses),
            summary=f"{num_responses} of {pool.num_responses} responses are new to the oracle",
        )
    return Responses(key=key, table=table, num_prompts=pool.num_prompts, num_responses=done.metrics.num_responses)


def unjudged_block(judged: frozenset[ResponseKey], responses: BlockTable, block: int) -> pa.Table:
    """Read one block of responses without the judged ones; prompts stay, so that ordinals keep their places."""
    rows = responses.read(block).to_pylist()
    for row in rows:
        row["responses"] = [r for r in row["responses"] if (row["prompt_id"], r["text"]) not in judged]
    return pa.Table.from_pylist(rows, schema=arrow_schema(Sampled))


def responses_of_seed_data(run: Run, tables: Sequence[SeedDataConfig] = ()) -> Responses:
    """Lay the seed data's responses down as a responses table; `tables` are read in its place, one after the other."""
    config = run.config
    others = [table.science_json() for table in tables]
    key = run.key(SEED_RESPONSES, config.seed_data, config.policy, config.generate.block_size, *others)
    rows = seed_responses(run, tables)
    size = config.generate.block_size
    blocks = [rows[start : start + size] for start in range(0, len(rows), size)]
    table = BlockTable(run.folder(SEED_RESPONSES, "table"), len(blocks))
    num_responses = sum(len(row.responses) for row in rows)
    if run.finished(SEED_RESPONSES, key) is None:
        started = time.monotonic()
        for number, block in enumerate(blocks):
            table.write(number, to_table(block, Sampled))
        run.finish(
            SEED_RESPONSES,
            key,
            since=started,
            num_rows=len(rows),
            metrics=SeedResponsesMetrics(num_responses=num_responses),
            summary=f"{num_responses} responses of the seed data stand in for M1's",
        )
    return Responses(key=key, table=table, num_prompts=len(rows), num_responses=num_responses)


def count_seed_responses(config: RunConfig) -> dict[str, int]:
    """Count the distinct responses of the seed data, by the id of their prompt."""
    assert config.seed_data is not None, "the config is refused without seed data"
    texts: dict[str, set[str]] = {}
    for prompt, text in read_seed_rows(config.seed_data, renderer_of(load_tokenizer(config.policy), config.policy)):
        texts.setdefault(prompt.id, set()).add(text)
    return {prompt_id: len(responses) for prompt_id, responses in texts.items()}


def seed_responses(run: Run, tables: Sequence[SeedDataConfig] = ()) -> list[Sampled]:
    """Read the seed data, or `tables`, one row per prompt with its distinct responses."""
    config = run.config
    assert config.seed_data is not None, "the config is refused without seed data"
    tokenizer = load_tokenizer(config.policy)
    renderer = renderer_of(tokenizer, config.policy)
    grouped: dict[str, Sampled] = {}
    rows = chain.from_iterable(read_seed_rows(table, renderer) for table in tables or [config.seed_data])
    for prompt, text in rows:
        if prompt.id not in grouped:
            tokens = encode_prompt(tokenizer, prompt.rendered, config.policy.prompt_format)
            grouped[prompt.id] = Sampled(prompt_id=prompt.id, prompt=prompt.text, prompt_token_ids=tokens, responses=[])
        responses = grouped[prompt.id].responses
        if any(response.text == text for response in responses):
            continue
        responses.append(
            Response(
                id=f"seed-{prompt.id}-{len(responses)}",
                text=text,
                token_ids=encode_response(tokenizer, text, config.policy.prompt_format),
                seed=0,
                policy_version="seed data",
                # Not measured: the policy did not write it, and is not trained on it.
                logprob=math.nan,
                finish_reason="data",
            )
        )
    return list(grouped.values())
