"""Stage synthesize: preference pairs from the policy's own samples that nobody judged (arXiv 2403.19279, Sec. 4.2).

"spg" clusters the samples of each prompt by meaning, and pairs the largest cluster's best response with one of the
others. Two controls rank responses instead, best against worst: "reward_pairs" by the same reward model, "self_judged"
by the policy itself (RLAIF).

A block is scored, clustered and paired, and each step is kept. All blocks are scored before any is clustered: in mode
`alternate` the entailment model then finds its room.
"""

import json
import time
from dataclasses import replace
from typing import Any

from rayrl.data.blocks import BlockTable, map_blocks
from rayrl.fleets.services import Services
from rayrl.models.judge_prompt import load_rubric
from rayrl.records import Checkpoint
from rayrl.runs.run import Manifest, Run
from rayrl.stages.artifacts import Preferences, Responses
from rayrl.stages.rewards.evaluator import Evaluator
from rayrl.stages.rewards.reward_models import Reward
from rayrl.stages.synthesis.cluster_blocks import cluster
from rayrl.stages.synthesis.counts import count_lengths, mean_lengths, merge, tally
from rayrl.stages.synthesis.synthetic_pairs import BlockRewards, SyntheticPairs

STAGE = "synthesize"
CONCURRENCY = 4
"""Blocks in flight where no fleet of this stage says otherwise."""


def synthesize_preferences(
    run: Run,
    services: Services,
    m1: Checkpoint,
    reward: Reward | BlockRewards,
    samples: Responses,
) -> Preferences:
    """D^: at most one pair for every prompt of the samples.

    Args:
        run: the run; `refresh.method` and `refresh.spg` say how.
        services: fleets; in mode `alternate` the one that serves the reward may be gone afterwards.
        m1: embeds the responses, if embeddings are clustered and no other embedder is named; in a later round of
            DPO the policy that wrote them.
        reward: the reward model that the policy behind the samples was trained with; for the method "self_judged",
            `self_judge`; or the scores another stage makes of these samples.
        samples: n responses of the policy for each prompt.
    """
    config = run.config.refresh
    is_kept = isinstance(reward, BlockRewards)
    reward_key = reward.key if is_kept else None  # a reward to be served is in the version of the policy behind samples
    key = run.key(STAGE, config.method, *_settings(run), reward_key, m1.version, samples.key)
    folder = run.folder(STAGE, key)
    done = run.finished(STAGE, key)
    if done is None:
        pairs = SyntheticPairs(
            method=config.method,
            clustering=config.spg.clustering if config.method == "spg" else None,
            gamma=config.spg.gamma,
            seed=run.config.seed,
            m1_version=m1.version,
            rewards=reward if is_kept else reward.serve(services),
            samples=samples.table,
            folder=folder,
        )
        done = _synthesize(run, services, m1, pairs, key)
    return Preferences(key=key, table=BlockTable(f"{folder}/table", samples.table.num_blocks), num_pairs=done.num_rows)


def _settings(run: Run) -> list[str]:
    """What else decides about the pairs, by method."""
    config, evaluator = run.config.refresh, run.config.evaluator
    match config.method:
        case "spg":  # embeddings cluster, or are tried where entailment accepts nothing
            return [config.spg.model_dump_json(), run.config.select.pooling]
        case "self_judged":
            sampled = f"{evaluator.scoring} {evaluator.num_samples} {evaluator.max_rationale_tokens}"
            return [load_rubric(run.config.rubric).version, sampled]
        case _:
            return []


def self_judge(run: Run, policy: Checkpoint) -> Evaluator:
    """The policy as its own judge: the run's rubric read as by a generative evaluator, with the policy's weights.

    Pointwise, as `evaluator.scoring` says: n answers per prompt instead of the n (n - 1) that comparisons in both
    orders would take. A policy that gives the scores no weight abstains.
    """
    config = run.config.model_copy(update={"evaluator": run.config.evaluator.model_copy(update={"type": "generative"})})
    return Evaluator(checkpoint=policy, m1=policy, config=config)


def _synthesize(run: Run, services: Services, m1: Checkpoint, pairs: SyntheticPairs, key: str) -> Manifest:
    started = time.monotonic()
    map_blocks(
        pairs.scored, pairs.score_block, concurrency=CONCURRENCY, describe=lambda _: {"num": 1}, progress="reward"
    )
    metrics: dict[str, Any] = {"method": pairs.method, "num_blocks": pairs.samples.num_blocks}
    if pairs.clustering:
        metrics |= {"clustering": pairs.clustering, "gamma": pairs.gamma}
        metrics |= cluster(run, services, m1, pairs.samples, pairs.clusters, pairs.clustering)
    metrics |= _outcomes(pairs)
    lengths = map_blocks(
        pairs.table, pairs.pair_block, concurrency=CONCURRENCY, describe=count_lengths, progress="pair"
    )
    metrics |= mean_lengths(lengths)
    refused = ", ".join(f"{n} {reason}" for reason, n in metrics["outcomes"].items() if reason != "accepted")
    summary = f"{metrics['num_pairs']} pairs from {metrics['num_prompts']} prompts; refused: {refused or 'none'}"
    if pairs.clustering not in (None, "embedding") and not metrics["num_pairs"]:
        beside = replace(pairs, clustering="embedding")
        cluster(run, services, m1, beside.samples, beside.clusters, "embedding")
        rate = _outcomes(beside)["acceptance_rate"]
        metrics["embedding_acceptance_rate"] = rate
        summary = f"no pair: {summary}; clusters of embeddings would accept {rate:.0%} of the prompts"
    return run.finish(STAGE, key, since=started, num_rows=metrics["num_pairs"], metrics=metrics, summary=summary)


def _outcomes(pairs: SyntheticPairs) -> dict[str, Any]:
    """Decide about every prompt; what that amounts to."""
    counts = map_blocks(
        pairs.outcomes,
        pairs.outcome_block,
        concurrency=CONCURRENCY,
        describe=lambda block: {"tally": json.dumps(tally(block))},
        progress="pair",
    )
    merged = merge([json.loads(count["tally"]) for count in counts])
    num_prompts, num_pairs = sum(merged["outcomes"].values()), merged["outcomes"].get("accepted", 0)
    rate = num_pairs / max(1, num_prompts)
    return {"num_prompts": num_prompts, "num_pairs": num_pairs, "acceptance_rate": rate} | merged
