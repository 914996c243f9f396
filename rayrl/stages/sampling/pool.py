"""Stage pool: read the prompts once, hold some out for evaluation, and lay the rest down in fixed blocks."""

import heapq
import itertools
import time
from collections.abc import Iterator

import pyarrow as pa

from rayrl.data.blocks import BlockTable
from rayrl.data.reading import PromptCounts, read_prompts
from rayrl.data.tokenizing import encode_prompts, load_tokenizer, renderer_of, room_of
from rayrl.records import Prompt, content_id
from rayrl.runs.run import Manifest, Run
from rayrl.runs.stage_metrics import PoolMetrics
from rayrl.runs.stage_table import POOL
from rayrl.stages.artifacts import Pool

SCHEMA = pa.schema(
    [
        pa.field("id", pa.string(), nullable=False),
        pa.field("text", pa.string(), nullable=False),
        pa.field("token_ids", pa.list_(pa.field("item", pa.int64(), nullable=False)), nullable=False),
    ]
)


def read_pool(run: Run) -> Pool:
    """Read X and the held-out prompts; the seed and the prompts' text decide which are held out, not their order."""
    config = run.config
    key = run.key(POOL, config.pool, config.policy, config.generate.block_size)
    done = run.finished(POOL, key) or _lay_out(run, key)
    return Pool(
        key=key,
        train=BlockTable(run.folder(POOL, "train"), done.metrics.num_train_blocks),
        held_out=BlockTable(run.folder(POOL, "held_out"), done.metrics.num_held_out_blocks),
        num_prompts=done.metrics.num_prompts,
        num_eval=done.metrics.num_eval,
    )


def _lay_out(run: Run, key: str) -> Manifest[PoolMetrics]:
    started = time.monotonic()
    config = run.config
    tokenizer = load_tokenizer(config.policy)
    renderer = renderer_of(tokenizer, config.policy)
    room = room_of(tokenizer, config.policy)

    def prompts(counts: PromptCounts | None = None) -> Iterator[Prompt]:
        return read_prompts(config.pool, renderer, counts, room)

    held_out_ids = _draw_held_out(run, prompts())
    counts = PromptCounts()

    def write(name: str, part: Iterator[Prompt]) -> tuple[int, int]:
        """Write one table block by block; its number of blocks and of prompts."""
        num_blocks, num_prompts = 0, 0
        # One block in memory at a time: a pool may have millions of prompts.
        while block := list(itertools.islice(part, config.generate.block_size)):
            tokens = encode_prompts(tokenizer, [prompt.rendered for prompt in block], config.policy.prompt_format)
            rows = [
                {"id": prompt.id, "text": prompt.text, "token_ids": token_ids}
                for prompt, token_ids in zip(block, tokens, strict=True)
            ]
            table = BlockTable(run.folder(POOL, name), num_blocks)
            table.write(num_blocks, pa.Table.from_pylist(rows, schema=SCHEMA))
            num_blocks += 1
            num_prompts += len(block)
        return num_blocks, num_prompts

    # The rows are counted in one of the two passes only.
    training = (prompt for prompt in prompts(counts) if prompt.id not in held_out_ids)
    num_train_blocks, num_prompts = write("train", training)
    held_out = (prompt for prompt in prompts() if prompt.id in held_out_ids)
    num_held_out_blocks, num_eval = write("held_out", held_out)
    bad_rows = f"; {counts.bad_rows.in_words()}" if counts.bad_rows.num else ""
    num_marked = counts.num_with_control_tokens
    with_control_tokens = f"; {num_marked} prompts hold control tokens, read as ordinary text" if num_marked else ""
    return run.finish(
        POOL,
        key,
        since=started,
        num_rows=num_prompts,
        metrics=PoolMetrics(
            num_rows=counts.num_rows,
            num_empty=counts.num_empty,
            num_bad=counts.bad_rows.num,
            first_bad=counts.bad_rows.first,
            num_duplicates=counts.num_duplicate,
            num_prompts=num_prompts,
            num_eval=num_eval,
            num_train_blocks=num_train_blocks,
            num_held_out_blocks=num_held_out_blocks,
            num_with_control_tokens=counts.num_with_control_tokens,
        ),
        summary=f"{num_prompts} prompts and {num_eval} held out; "
        f"{counts.num_duplicate} duplicate and {counts.num_empty} empty rows dropped{bad_rows}{with_control_tokens}",
    )


def _draw_held_out(run: Run, prompts: Iterator[Prompt]) -> set[str]:
    """Ids of the held-out prompts: those that come first in an order drawn by the seed."""
    # A hash of the text decides, so that rows added to the file later move no prompt to the other side.
    drawn = ((content_id("held out", str(run.seed), prompt.id), prompt.id) for prompt in prompts)
    return {prompt_id for _, prompt_id in heapq.nsmallest(run.config.pool.num_eval, drawn)}
