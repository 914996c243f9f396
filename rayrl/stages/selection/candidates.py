"""Which responses the expert may be asked about: M1's own, or, as the off-policy control, those of the seed data.

Either way the evaluator labels M1's responses, and the policy is trained on those. In a later round those that the
expert has judged already are left out.
"""

import math
import time
from collections.abc import Sequence
from functools import partial

import pyarrow as pa

from rayrl.data.blocks import BlockTable, map_blocks
from rayrl.data.reading import read_seed_rows
from rayrl.data.tokenizing import encode_prompt, encode_response, load_tokenizer, render
from rayrl.records import Response, Said, Sampled, arrow_schema, to_table
from rayrl.runs.run import Run
from rayrl.stages.artifacts import Judgements, Responses

CONCURRENCY = 4
"""Blocks in flight."""


def candidates(run: Run, responses: Responses, paid: Sequence[Judgements] = ()) -> Responses:
    """The pool of the selection: the policy's responses, or the seed data's, without those judged in `paid`."""
    pool = responses if run.config.generate.source == "policy" else _of_seed_data(run)
    return _unjudged(run, pool, paid) if paid else pool


def _unjudged(run: Run, pool: Responses, paid: Sequence[Judgements]) -> Responses:
    """The pool without what the expert was asked about in earlier rounds, whether it answered or abstained."""
    key = run.key("candidates", pool.key, *(of_round.key for of_round in paid))
    table = BlockTable(run.folder("candidates", "table"), pool.table.num_blocks)
    done = run.finished("candidates", key)
    if done is None:
        started = time.monotonic()
        judged = frozenset(judgement.said for of_round in paid for judgement in of_round.all())
        counts = map_blocks(
            table,
            partial(without, judged, pool.table),
            concurrency=CONCURRENCY,
            describe=lambda block: {"num": sum(map(len, block["responses"].to_pylist()))},
            progress="candidates",
        )
        block_counts = [count["num"] for count in counts]
        done = run.finish(
            "candidates",
            key,
            since=started,
            num_rows=pool.num_prompts,
            metrics={"num_responses": sum(block_counts), "block_counts": block_counts},
            summary=f"{sum(block_counts)} of {pool.num_responses} responses are new to the expert",
        )
    return Responses(
        key=key,
        table=table,
        num_prompts=pool.num_prompts,
        num_responses=done.metrics["num_responses"],
        block_counts=done.metrics["block_counts"],
    )


def without(judged: frozenset[Said], responses: BlockTable, block: int) -> pa.Table:
    """One block of responses without the judged ones; their prompts stay."""
    rows = responses.read(block).to_pylist()
    left = [
        row | {"responses": [r for r in row["responses"] if (row["prompt_id"], r["text"]) not in judged]}
        for row in rows
    ]
    return pa.Table.from_pylist(left, schema=arrow_schema(Sampled))


def _of_seed_data(run: Run) -> Responses:
    key = run.key("seed_responses", run.config.seed_data, run.config.policy, run.config.generate.block_size)
    rows = seed_responses(run)
    size = run.config.generate.block_size
    blocks = [rows[start : start + size] for start in range(0, len(rows), size)]
    table = BlockTable(run.folder("seed_responses", "table"), len(blocks))
    num_responses = sum(len(row.responses) for row in rows)
    if run.finished("seed_responses", key) is None:
        started = time.monotonic()
        for number, block in enumerate(blocks):
            table.write(number, to_table(block, Sampled))
        run.finish(
            "seed_responses",
            key,
            since=started,
            num_rows=len(rows),
            metrics={"num_responses": num_responses},
            summary=f"{num_responses} responses of the seed data stand in for M1's",
        )
    return Responses(
        key=key,
        table=table,
        num_prompts=len(rows),
        num_responses=num_responses,
        block_counts=[sum(len(row.responses) for row in block) for block in blocks],
    )


def seed_responses(run: Run) -> list[Sampled]:
    """The seed data, one row per prompt with its distinct responses."""
    config = run.config
    assert config.seed_data is not None, "the config is refused without seed data"
    tokenizer = load_tokenizer(config.policy)
    renderer = partial(render, tokenizer, config.policy.prompt_format)
    grouped: dict[str, Sampled] = {}
    for prompt, text in read_seed_rows(config.seed_data, renderer):
        tokens = encode_prompt(tokenizer, prompt.rendered, config.policy.prompt_format)
        new = Sampled(prompt_id=prompt.id, prompt=prompt.text, prompt_token_ids=tokens, responses=[])
        row = grouped.setdefault(prompt.id, new)
        if all(text != response.text for response in row.responses):
            row.responses.append(
                Response(
                    id=f"seed-{prompt.id}-{len(row.responses)}",
                    text=text,
                    token_ids=encode_response(tokenizer, text),
                    seed=0,
                    policy_version="seed data",
                    logprob=math.nan,  # the policy did not say it, and is not trained on it
                    finish_reason="data",
                )
            )
    return list(grouped.values())
