"""Stage pool: read the prompts once, hold some out for evaluation, and lay the rest down in fixed blocks."""

import heapq
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from functools import partial
from typing import Any

import pyarrow as pa

from rayrl.data.blocks import BlockTable
from rayrl.data.reading import PromptCounts, read_prompts
from rayrl.data.tokenizing import encode_prompts, load_tokenizer, render
from rayrl.records import Prompt, content_id
from rayrl.runs.run import Run
from rayrl.stages.artifacts import Pool

SCHEMA = pa.schema(
    [
        pa.field("id", pa.string(), nullable=False),
        pa.field("text", pa.string(), nullable=False),
        pa.field("token_ids", pa.list_(pa.field("item", pa.int64(), nullable=False)), nullable=False),
    ]
)


def read_pool(run: Run) -> Pool:
    """X and the held-out prompts. Which prompts are held out depends on the seed and their text, not on their order."""
    config = run.config
    key = run.key("pool", config.pool, config.policy, config.generate.block_size)
    done = run.finished("pool", key)
    if done is None:
        done = _lay_out(run, key)
    counts = done.metrics

    def table(name: str) -> BlockTable:
        return BlockTable(run.folder("pool", name), counts[f"{name}_blocks"])

    return Pool(
        key=key,
        train=table("train"),
        held_out=table("held_out"),
        num_prompts=counts["num_prompts"],
        num_eval=counts["num_eval"],
    )


def _lay_out(run: Run, key: str) -> Any:
    started = time.monotonic()
    config = run.config
    tokenizer = load_tokenizer(config.policy)
    renderer = partial(render, tokenizer, config.policy.prompt_format)
    ranks = ((_draw(run, prompt.id), prompt.id) for prompt in read_prompts(config.pool, renderer))
    held_out = {identifier for _, identifier in heapq.nsmallest(config.pool.num_eval, ranks)}
    counts = PromptCounts()
    num_blocks, num_prompts = {}, {}
    for name in ("train", "held_out"):
        chosen = (
            p
            for p in read_prompts(config.pool, renderer, counts if name == "train" else None)
            if (p.id in held_out) == (name == "held_out")
        )
        table, num_prompts[name] = BlockTable(run.folder("pool", name), 0), 0
        block = -1
        for block, rows in enumerate(_chunks(chosen, config.generate.block_size)):
            tokens = encode_prompts(tokenizer, [p.rendered for p in rows], config.policy.prompt_format)
            records = [{"id": p.id, "text": p.text, "token_ids": t} for p, t in zip(rows, tokens, strict=True)]
            table.write(block, pa.Table.from_pylist(records, schema=SCHEMA))
            num_prompts[name] += len(rows)
        num_blocks[name] = block + 1
    metrics = asdict(counts) | {f"{name}_blocks": n for name, n in num_blocks.items()}
    metrics |= {"num_prompts": num_prompts["train"], "num_eval": num_prompts["held_out"]}
    dropped = f"{counts.num_duplicate} duplicate and {counts.num_empty} empty rows dropped"
    return run.finish(
        "pool",
        key,
        since=started,
        num_rows=num_prompts["train"],
        metrics=metrics,
        summary=f"{num_prompts['train']} prompts and {num_prompts['held_out']} held out; {dropped}",
    )


def _draw(run: Run, identifier: str) -> str:
    return content_id("held out", str(run.config.seed), identifier)


def _chunks(prompts: Iterable[Prompt], size: int) -> Iterator[list[Prompt]]:
    chunk: list[Prompt] = []
    for prompt in prompts:
        chunk.append(prompt)
        if len(chunk) == size:
            yield chunk
            chunk = []
    if chunk:
        yield chunk
