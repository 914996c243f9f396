"""Stage sft: M0 -> M1 on the seed data.

With `sft.turns = "all"` each turn of the assistant is an example of its own, whose prompt is the chat before it. One
sequence for a whole chat with a mask over its tokens would read the earlier turns once, not once for each later turn.
But many chat templates write a turn otherwise once others follow it (they drop its thoughts, say), and the policy would
learn to continue texts that it is never asked to continue.
"""

import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass

import pyarrow as pa

from rayrl.data.blocks import BlockTable
from rayrl.data.reading import PromptCounts, Turns, read_seed_rows
from rayrl.data.tokenizing import context_length, encode_prompt, encode_response, load_tokenizer, renderer_of
from rayrl.errors import DataError
from rayrl.fleets.services import Services
from rayrl.records import Checkpoint, content_id
from rayrl.runs.run import Run
from rayrl.runs.stage_metrics import SftMetrics
from rayrl.runs.stage_table import SFT
from rayrl.stages.fitting import fit_stage, hold_out, losses_of, stream_of
from rayrl.training.sft import SftJob, train_sft

TOKENS = pa.list_(pa.field("item", pa.int64(), nullable=False))
SCHEMA = pa.schema(
    [
        pa.field("prompt_id", pa.string(), nullable=False),
        pa.field("prompt_token_ids", TOKENS, nullable=False),
        pa.field("response_token_ids", TOKENS, nullable=False),
    ]
)
ROWS_PER_BLOCK = 512


@dataclass(frozen=True, kw_only=True)
class Example:
    """One tokenised response of the seed data, and the prompt before it."""

    prompt_id: str
    prompt_token_ids: list[int]
    response_token_ids: list[int]


@dataclass(frozen=True, kw_only=True)
class Examples:
    """The table of examples, and what became of the rows of the file."""

    table: BlockTable
    num_examples: int
    rows: PromptCounts
    cut: Counter[str]
    """How many examples the context is too short for: `num_truncated` responses cut to it, `num_too_long` left out."""


def base_policy(run: Run) -> Checkpoint:
    """Return M0, as the config names it."""
    policy = run.config.policy
    version = content_id("policy", policy.path, policy.revision or "", *run.content("policy."))
    return Checkpoint(path=policy.path, version=version, revision=policy.revision)


def sft(run: Run, services: Services) -> Checkpoint:
    """Make M1: fine-tune M0 on the responses of the seed data; M0 itself if sft is off."""
    config = run.config
    if not config.sft.enabled:
        return base_policy(run)
    key = run.key(SFT, config.sft, config.policy, config.seed_data)
    checkpoint = Checkpoint(path=run.folder(SFT, "checkpoint"), version=f"sft-{key}")
    if run.finished(SFT, key):
        return checkpoint
    started = time.monotonic()
    examples = tokenise(run)
    held_out = hold_out(run, SFT, examples.table, config.sft)
    job = SftJob(
        stage=SFT.name,
        run_url=run.url,
        checkpoint_url=checkpoint.path,
        policy=config.policy,
        start=base_policy(run),
        training=config.sft,
        dtype=services.dtype,
        seed=run.seed,
        num_rows=examples.num_examples - held_out.num_rows,
        held_out=held_out.table,
    )
    stream = stream_of(examples.table, run.seed, without=held_out.prompts)
    curve = fit_stage(run, services, SFT, train_sft, job, config.sft, stream)
    run.finish(
        SFT,
        key,
        since=started,
        num_rows=examples.num_examples,
        metrics=SftMetrics(
            **asdict(curve),
            num_empty=examples.rows.num_empty,
            num_below_score=examples.rows.num_below_score,
            num_without_score=examples.rows.num_without_score,
            num_bad=examples.rows.bad_rows.num,
            num_used_rows=examples.rows.num_kept,
            num_skipped_turns=examples.rows.num_skipped_turns,
            **examples.cut,
        ),
        summary=f"{counted(examples, config.sft.turns)}{_left_out(examples)}, {losses_of(curve)}",
    )
    return checkpoint


def counted(examples: Examples, turns: Turns) -> str:
    """Write how many examples there are; with all turns, of how many chats, and how many turns are none."""
    if turns == "last":
        return f"{examples.num_examples} examples"
    num = examples.rows.num_skipped_turns
    skipped = f" ({num} more are empty, call a tool, or answer nothing)" if num else ""
    return f"{examples.num_examples} examples, the assistant's turns in {examples.rows.num_kept} chats{skipped}"


def _left_out(examples: Examples) -> str:
    """Write how many examples were left out because their prompts fill the context, and the bad rows; empty if none."""
    num = examples.cut["num_too_long"]
    too_long = f" ({num} left out: their prompts fill the context)" if num else ""
    bad_rows = examples.rows.bad_rows.in_words()
    return f"{too_long} ({bad_rows})" if bad_rows else too_long


def tokenise(run: Run) -> Examples:
    """Write the tokenised seed data block by block.

    Raises:
        DataError: no row is left; the message counts what became of the rows.
    """
    assert run.config.seed_data is not None, "the config is refused without seed data"
    rows = PromptCounts()
    cut = Counter(num_truncated=0, num_too_long=0)
    url = run.folder(SFT, "table")
    num_blocks, num_examples = 0, 0
    block: list[dict[str, object]] = []

    def write_block() -> None:
        BlockTable(url, num_blocks).write(num_blocks, pa.Table.from_pylist(block, schema=SCHEMA))

    for example in _examples(run, rows, cut):
        num_examples += 1
        block.append(
            {
                "prompt_id": example.prompt_id,
                "prompt_token_ids": example.prompt_token_ids,
                "response_token_ids": example.response_token_ids,
            }
        )
        if len(block) == ROWS_PER_BLOCK:
            write_block()
            num_blocks += 1
            block.clear()
    if block:
        write_block()
        num_blocks += 1
    if num_examples == 0:
        raise DataError(
            f"seed_data.path {run.config.seed_data.path} leaves no row: {rows.num_rows} read, "
            f"{rows.num_empty} empty, {rows.num_below_score} below min_score, {rows.num_without_score} without a "
            f"score, {rows.bad_rows.num} bad, {cut['num_too_long']} with a prompt that "
            "fills the context; lower min_score, add data, or raise policy.max_model_len if the model allows it"
        )
    table = BlockTable(url, num_blocks)
    return Examples(table=table, num_examples=num_examples, rows=rows, cut=cut)


def _examples(run: Run, rows: PromptCounts, cut: Counter[str]) -> Iterator[Example]:
    """Yield examples with their responses cut to the context, without those whose prompts fill it.

    A prompt is never cut: a chat would lose the header of the assistant's turn, and the response would follow a text
    that the policy is never asked to continue.
    """
    config = run.config
    assert config.seed_data is not None
    tokenizer = load_tokenizer(config.policy)
    limit = context_length(config.policy)
    renderer = renderer_of(tokenizer, config.policy)
    for prompt, response in read_seed_rows(config.seed_data, renderer, rows, turns=config.sft.turns):
        prompt_ids = encode_prompt(tokenizer, prompt.rendered, config.policy.prompt_format)
        room = limit - len(prompt_ids)
        if room < 1:
            cut["num_too_long"] += 1
            continue
        response_ids = encode_response(tokenizer, response, config.policy.prompt_format)
        cut["num_truncated"] += len(response_ids) > room
        yield Example(prompt_id=prompt.id, prompt_token_ids=prompt_ids, response_token_ids=response_ids[:room])
