"""Stage sft: M0 -> M1 on the seed data."""

import time
from collections.abc import Iterator
from functools import partial
from typing import Any

import pyarrow as pa

from rayrl.data.blocks import BlockTable
from rayrl.data.reading import PromptCounts, read_seed_rows
from rayrl.data.tokenizing import context_length, encode_prompt, encode_response, load_tokenizer, render
from rayrl.errors import DataError
from rayrl.fleets.services import Services
from rayrl.records import Checkpoint, content_id
from rayrl.runs.run import Run
from rayrl.stages.fitting import fit_stage, stream_of
from rayrl.training.sft import SftJob, train_sft

TOKENS = pa.list_(pa.field("item", pa.int64(), nullable=False))
SFT_SCHEMA = pa.schema(
    [
        pa.field("prompt_id", pa.string(), nullable=False),
        pa.field("prompt_token_ids", TOKENS, nullable=False),
        pa.field("response_token_ids", TOKENS, nullable=False),
    ]
)
ROWS_PER_BLOCK = 512


def base_policy(run: Run) -> Checkpoint:
    """M0, as the config names it."""
    policy = run.config.policy
    return Checkpoint(path=policy.path, version=content_id("policy", policy.path, policy.revision or ""))


def sft(run: Run, services: Services) -> Checkpoint:
    """M1: completion-only fine-tuning of M0 on the seed data, or M0 itself if sft is off."""
    config = run.config
    if not config.sft.enabled:
        return base_policy(run)
    key = run.key("sft", config.sft, config.policy, config.seed_data)
    checkpoint = Checkpoint(path=run.folder("sft", "checkpoint"), version=f"sft-{key}")
    if run.finished("sft", key):
        return checkpoint
    started = time.monotonic()
    table, num_rows, metrics = _tokenise(run)
    job = SftJob(
        stage="sft",
        run_url=run.url,
        checkpoint_url=checkpoint.path,
        policy=config.policy,
        training=config.sft,
        dtype=services.dtype,
        seed=config.seed,
        num_rows=num_rows,
    )
    curve = fit_stage(run, services, "sft", train_sft, job, config.sft, stream_of(table, config.seed))
    run.finish(
        "sft",
        key,
        since=started,
        num_rows=num_rows,
        metrics=metrics | curve,
        summary=f"{num_rows} examples, loss {curve['first_loss']:.3f} -> {curve['final_loss']:.3f}",
    )
    return checkpoint


def _tokenise(run: Run) -> tuple[BlockTable, int, dict[str, Any]]:
    assert run.config.seed_data is not None
    counts = PromptCounts()
    truncated = 0
    block, num_rows, rows = 0, 0, []
    table = BlockTable(run.folder("sft", "table"), 0)
    for row, cut in _rows(run, counts):
        truncated += cut
        rows.append(row)
        num_rows += 1
        if len(rows) == ROWS_PER_BLOCK:
            table.write(block, pa.Table.from_pylist(rows, schema=SFT_SCHEMA))
            block, rows = block + 1, []
    if rows:
        table.write(block, pa.Table.from_pylist(rows, schema=SFT_SCHEMA))
        block += 1
    if num_rows == 0:
        raise DataError(
            f"seed_data.path {run.config.seed_data.path} leaves no row: {counts.num_rows} read, "
            f"{counts.num_empty} empty, {counts.num_below_score} below min_score; lower min_score or add data"
        )
    metrics = {
        "num_empty": counts.num_empty,
        "num_below_score": counts.num_below_score,
        "num_truncated": truncated,
    }
    return BlockTable(table.url, block), num_rows, metrics


def _rows(run: Run, counts: PromptCounts) -> Iterator[tuple[dict[str, Any], bool]]:
    """Tokenised examples, and whether the response had to be cut to the context."""
    config = run.config
    assert config.seed_data is not None
    tokenizer = load_tokenizer(config.policy)
    limit = context_length(config.policy)
    renderer = partial(render, tokenizer, config.policy.prompt_format)
    for prompt, response in read_seed_rows(config.seed_data, renderer, counts):
        prompt_ids = encode_prompt(tokenizer, prompt.rendered, config.policy.prompt_format)[: limit - 1]
        response_ids = encode_response(tokenizer, response)
        room = limit - len(prompt_ids)
        yield (
            {"prompt_id": prompt.id, "prompt_token_ids": prompt_ids, "response_token_ids": response_ids[:room]},
            len(response_ids) > room,
        )
