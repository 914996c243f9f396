"""Stage generate: k on-policy responses for every prompt, y ~ pi(. | x).

The same work under another name (`samples`) samples the policy that PPO has made, for the refresh of the reward model.
"""

import time
from collections import Counter
from dataclasses import asdict, replace
from functools import partial

import pyarrow as pa

from rayrl.config import GenerateConfig
from rayrl.data.blocks import BlockTable, map_blocks
from rayrl.engines.generator import Continuation, Sampling
from rayrl.fleets.fleet import Fleet
from rayrl.fleets.services import Services
from rayrl.records import Checkpoint, Response, Sampled, drawn_seed, to_table
from rayrl.runs.run import Run
from rayrl.runs.stage_metrics import GenerateMetrics
from rayrl.runs.stage_table import GENERATE, Stage
from rayrl.stages.artifacts import Pool, Responses


def generate(
    run: Run,
    services: Services,
    policy: Checkpoint,
    pool: Pool,
    *,
    stage: Stage[GenerateMetrics] = GENERATE,
    k: int | None = None,
    sampling: Sampling | None = None,
) -> Responses:
    """Sample Y: k responses of the policy to every prompt of the pool.

    Args:
        run: the run.
        services: fleets; the generators answer.
        policy: M1, or in a later stage or round the policy that it has become.
        pool: the prompts.
        stage: the entry of the stage table that this work is.
        k: responses per prompt; None is the run's `generate.k`.
        sampling: None is the run's `generate`.
    """
    k = k or run.config.generate.k
    sampling = sampling or sampling_of(run.config.generate)
    # Not the whole table of the config: the block size is a part of the pool's key, the source is another stage's.
    key = run.key(stage, k, *asdict(sampling).values(), pool.key, policy.version)
    table = BlockTable(run.folder(stage, "table"), pool.train.num_blocks)
    done = run.finished(stage, key)
    if done is None:
        started = time.monotonic()
        fleet = services.ready(services.generators(policy))
        compute = partial(sample_block, pool.train, fleet, policy, k, sampling, run.seed)
        counts = map_blocks(
            table, compute, concurrency=fleet.concurrency, describe=_count_responses, progress=stage.name
        )
        metrics = _metrics(counts, seconds=time.monotonic() - started)
        done = run.finish(
            stage,
            key,
            since=started,
            num_rows=metrics.num_prompts,
            metrics=metrics,
            summary=f"{metrics.num_responses} responses to {metrics.num_prompts} prompts, "
            f"{metrics.tokens_per_s:.0f} tokens/s; dropped {metrics.num_empty} empty, "
            f"{metrics.num_duplicates} duplicate",
        )
    return Responses(
        key=key, table=table, num_prompts=done.metrics.num_prompts, num_responses=done.metrics.num_responses
    )


def sampling_of(config: GenerateConfig) -> Sampling:
    """Return the run's way to sample a response, as the engines take it."""
    return Sampling(
        temperature=config.temperature,
        top_p=config.top_p,
        top_k=config.top_k,
        max_tokens=config.max_tokens,
        stop=tuple(config.stop),
    )


def own_sampling(config: GenerateConfig) -> Sampling:
    """Return how to sample from the policy itself: at temperature 1, without any of its distribution left out.

    Only such samples tell its own probabilities, which PPO's importance ratio and the KL are of.
    """
    return Sampling(temperature=1.0, max_tokens=config.max_tokens, stop=tuple(config.stop))


def response_seed(seed: int, prompt_id: str, index: int) -> int:
    """Draw the random stream of one response: a function of the run's seed and its place, and of nothing else.

    So any response can be sampled again alone, whatever it was batched with.
    """
    return drawn_seed("response", str(seed), prompt_id, str(index))


def sample_block(
    prompts: BlockTable,
    fleet: Fleet,
    policy: Checkpoint,
    k: int,
    sampling: Sampling,
    seed: int,
    block: int,
    *,
    keeps_all: bool = False,
) -> pa.Table:
    """Sample the responses to one block of prompts, k each; `keeps_all` keeps empty ones and repeats."""
    rows = prompts.read(block).to_pylist()
    seeds = [[response_seed(seed, row["id"], index) for index in range(k)] for row in rows]
    # One call for the whole block: vLLM batches the requests itself.
    samples: list[list[Continuation]] = fleet.call(
        "generate", policy, [row["token_ids"] for row in rows], seeds, sampling
    )
    sampled: list[Sampled] = []
    for row, row_seeds, continuations in zip(rows, seeds, samples, strict=True):
        responses = [
            _response(row["id"], index, row_seeds[index], policy.version, continuation)
            for index, continuation in enumerate(continuations)
        ]
        kept = responses if keeps_all else distinct(responses)
        num_empty = sum(not response.text.strip() for response in responses)
        sampled.append(
            Sampled(
                prompt_id=row["id"],
                prompt=row["text"],
                prompt_token_ids=row["token_ids"],
                responses=kept,
                num_empty=0 if keeps_all else num_empty,
                num_duplicates=0 if keeps_all else len(responses) - len(kept) - num_empty,
            )
        )
    return to_table(sampled, Sampled)


def distinct(responses: list[Response]) -> list[Response]:
    """Drop empty responses and repeats of an earlier one, which counts them: a second label would teach nothing."""
    first: dict[str, Response] = {}
    for response in responses:
        if response.text.strip():
            first.setdefault(response.text, response)
    # The number of repeats is kept, since clusters of synthetic preference generation are weighed by samples.
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


def _count_responses(block: pa.Table) -> dict[str, int]:
    """Count what the driver learns of a block."""
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


def _metrics(counts: list[dict[str, int]], *, seconds: float) -> GenerateMetrics:
    total = {name: sum(block[name] for block in counts) for name in counts[0]}
    # A policy may leave every response empty.
    num_responses = max(1, total["num_responses"])
    return GenerateMetrics(
        **total,
        mean_tokens=total["num_tokens"] / num_responses,
        truncated_share=total["num_truncated"] / num_responses,
        tokens_per_s=total["num_tokens"] / seconds,
    )
