"""Stage generate: k on-policy responses for every prompt, y ~ pi(. | x)."""

import time
from collections import Counter
from dataclasses import replace
from functools import partial

import pyarrow as pa

from rayrl.config import GenerateConfig
from rayrl.data.blocks import BlockTable, map_blocks
from rayrl.engines.generator import Continuation, Sampling
from rayrl.fleets.fleet import Fleet
from rayrl.fleets.services import Services
from rayrl.records import Checkpoint, Response, Sampled, content_id, to_table
from rayrl.runs.run import Run
from rayrl.stages.artifacts import Pool, Responses


def generate(
    run: Run,
    services: Services,
    policy: Checkpoint,
    pool: Pool,
    *,
    stage: str = "generate",
    config: GenerateConfig | None = None,
) -> Responses:
    """Y: k samples of the policy for every prompt of the pool.

    Args:
        run: the run.
        services: fleets.
        policy: who answers: M1, or in a later stage, with a name of its own, the policy it has become.
        pool: the prompts.
        stage: name of the stage.
        config: how it answers; None is the run's `generate`.
    """
    config = config or run.config.generate
    key = run.key(stage, config.model_copy(update={"source": "policy"}), pool.key, policy.version)
    table = BlockTable(run.folder(stage, "table"), pool.train.num_blocks)
    done = run.finished(stage, key)
    if done is None:
        started = time.monotonic()
        fleet = services.ready(services.generators(policy))
        compute = partial(sample_block, pool.train, fleet, policy, config, run.config.seed)
        counts = map_blocks(table, compute, concurrency=fleet.concurrency, describe=_count, progress="generate")
        total = {name: sum(block[name] for block in counts) for name in counts[0]}
        seconds = time.monotonic() - started
        done = run.finish(
            stage,
            key,
            since=started,
            num_rows=total["num_prompts"],
            metrics=total
            | {
                "block_counts": [block["num_responses"] for block in counts],
                "mean_tokens": total["num_tokens"] / max(1, total["num_responses"]),
                "truncated_share": total["num_truncated"] / max(1, total["num_responses"]),
                "tokens_per_s": total["num_tokens"] / seconds,
            },
            summary=f"{total['num_responses']} responses to {total['num_prompts']} prompts, "
            f"{total['num_tokens'] / seconds:.0f} tokens/s; dropped {total['num_empty']} empty, "
            f"{total['num_duplicates']} duplicate",
        )
    return Responses(
        key=key,
        table=table,
        num_prompts=done.metrics["num_prompts"],
        num_responses=done.metrics["num_responses"],
        block_counts=done.metrics["block_counts"],
    )


def response_seed(seed: int, prompt_id: str, index: int) -> int:
    """The random stream of one response: a function of the run's seed and its place, of nothing else."""
    return int(content_id("response", str(seed), prompt_id, str(index)), 16) >> 1


def sample_block(
    prompts: BlockTable, fleet: Fleet, policy: Checkpoint, config: GenerateConfig, seed: int, block: int
) -> pa.Table:
    """Responses to one block of prompts."""
    rows = prompts.read(block).to_pylist()
    seeds = [[response_seed(seed, row["id"], i) for i in range(config.k)] for row in rows]
    sampling = Sampling(
        temperature=config.temperature,
        top_p=config.top_p,
        top_k=config.top_k,
        max_tokens=config.max_tokens,
        stop=tuple(config.stop),
    )
    samples = fleet.call("generate", policy, [row["token_ids"] for row in rows], seeds, sampling)
    sampled = []
    for row, row_seeds, continuations in zip(rows, seeds, samples, strict=True):
        responses = [
            _response(row["id"], i, seed, policy.version, continuation)
            for i, (seed, continuation) in enumerate(zip(row_seeds, continuations, strict=True))
        ]
        sampled.append(
            Sampled(
                prompt_id=row["id"],
                prompt=row["text"],
                prompt_token_ids=row["token_ids"],
                responses=distinct(responses),
                num_empty=sum(not r.text.strip() for r in responses),
                num_duplicates=len(responses) - len(distinct(responses)) - sum(not r.text.strip() for r in responses),
            )
        )
    return to_table(sampled, Sampled)


def distinct(responses: list[Response]) -> list[Response]:
    """The responses without empty ones and without repeats of an earlier one, which counts them: a label on those
    teaches nothing.
    """
    first: dict[str, Response] = {}
    for response in responses:
        if response.text.strip():
            first.setdefault(response.text, response)
    repeats = Counter(response.text for response in responses)
    return [replace(response, num_samples=repeats[text]) for text, response in first.items()]


def _response(prompt_id: str, index: int, seed: int, version: str, sampled: Continuation) -> Response:
    return Response(
        id=f"{prompt_id}-{index}",
        text=sampled.text,
        token_ids=sampled.token_ids,
        seed=seed,
        policy_version=version,
        logprob=sampled.logprob,
        finish_reason=sampled.finish_reason,
    )


def _count(block: pa.Table) -> dict[str, int]:
    rows = block.to_pylist()
    responses = [response for row in rows for response in row["responses"]]
    return {
        "num_prompts": len(rows),
        "num_responses": len(responses),
        "num_empty": sum(row["num_empty"] for row in rows),
        "num_duplicates": sum(row["num_duplicates"] for row in rows),
        "num_tokens": sum(len(response["token_ids"]) for response in responses),
        "num_truncated": sum(response["finish_reason"] == "length" for response in responses),
    }
