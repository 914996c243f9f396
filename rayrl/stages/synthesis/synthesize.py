"""Stage synthesize: preference pairs from the policy's own samples, without a judgement (arXiv 2403.19279, Sec. 4.2).

"spg" clusters the samples of each prompt by meaning, and pairs the largest cluster's best response with one of the
others. Two controls rank responses instead, best against worst: "reward_pairs" by the same reward model, "self_judged"
by the policy itself (RLAIF).

A block is scored, clustered and paired, and each step is kept. All blocks are scored before any is clustered: in mode
`alternate` the entailment model then finds its room.
"""

import time
from dataclasses import replace

from rayrl.algorithms.clustering import CLUSTERINGS
from rayrl.data.blocks import map_blocks
from rayrl.fleets.services import Services
from rayrl.models.judge_prompt import load_rubric
from rayrl.records import Checkpoint
from rayrl.runs.run import Manifest, Run
from rayrl.runs.stage_metrics import SynthesizeMetrics
from rayrl.runs.stage_table import SYNTHESIZE
from rayrl.stages.artifacts import Preferences, Responses
from rayrl.stages.rewards.evaluator import Evaluator
from rayrl.stages.rewards.evaluators import evaluator_of
from rayrl.stages.rewards.protocol import Reward
from rayrl.stages.synthesis.clusters import cluster_blocks
from rayrl.stages.synthesis.outcomes import OutcomeCounts, add_counts, count_outcomes
from rayrl.stages.synthesis.synthetic_pairs import (
    BlockRewards,
    SyntheticPairs,
    count_lengths,
    mean_lengths,
    pairs_table,
)

CONCURRENCY = 4
"""Blocks in flight, except where the clustering fleet sets them."""
STAND_IN = "embedding"
"""Clustering that is tried beside one by entailment that accepts no prompt."""


def synthesize_preferences(
    run: Run,
    services: Services,
    m1: Checkpoint,
    reward: Reward | BlockRewards,
    samples: Responses,
) -> Preferences:
    """Make D^: at most one pair for every prompt of the samples.

    Args:
        run: the run; `refresh.method` and `refresh.spg` are the settings.
        services: fleets; in mode `alternate` the one that serves the reward may be gone afterwards.
        m1: embeds the responses, if embeddings are clustered and no other embedder is named; in a later round of
            DPO the policy that wrote them.
        reward: the reward model that the policy behind the samples was trained with; for the method "self_judged",
            `self_judge`; or the scores another stage makes of these samples.
        samples: n responses of the policy for each prompt.
    """
    config = run.config.refresh
    # A reward to be served needs no place in the key: the version of the policy behind the samples depends on it.
    reward_key = reward.key if isinstance(reward, BlockRewards) else None
    key = run.key(SYNTHESIZE, config.method, *_settings(run), reward_key, m1.version, samples.key)
    folder = run.folder(SYNTHESIZE, key)
    done = run.finished(SYNTHESIZE, key)
    if done is None:
        pairs = SyntheticPairs(
            method=config.method,
            clustering=config.spg.clustering if config.method == "spg" else None,
            gamma=config.spg.gamma,
            seed=run.seed,
            m1_version=m1.version,
            rewards=reward if isinstance(reward, BlockRewards) else reward.serve(services),
            samples=samples.table,
            folder=folder,
        )
        done = _synthesize(run, services, m1, pairs, key)
    return Preferences(key=key, table=pairs_table(folder, samples.table.num_blocks), num_pairs=done.num_rows)


def _settings(run: Run) -> list[str]:
    """List the settings that decide about the pairs, by method: a part of the stage's key."""
    config, evaluator = run.config.refresh, run.config.evaluator
    match config.method:
        case "spg":  # embeddings cluster, or are tried where entailment accepts nothing
            return [config.spg.science_json(), run.config.select.pooling, *run.content("refresh.spg.")]
        case "self_judged":
            sampled = f"{evaluator.scoring} {evaluator.num_samples} {evaluator.max_rationale_tokens}"
            return [load_rubric(run.config.rubric).version, sampled]
        case _:
            return []


def self_judge(run: Run, policy: Checkpoint) -> Evaluator:
    """Make the policy its own judge: a generative evaluator with the policy's weights, on the run's rubric.

    Pointwise, with `evaluator.scoring`: n answers per prompt instead of the n (n - 1) that comparisons in both
    orders would take. A policy that gives the scores no weight abstains.
    """
    return evaluator_of(run, policy, policy, kind="generative")


def _synthesize(
    run: Run, services: Services, m1: Checkpoint, pairs: SyntheticPairs, key: str
) -> Manifest[SynthesizeMetrics]:
    """Do the stage's work and write its manifest."""
    started = time.monotonic()
    map_blocks(
        pairs.scored,
        pairs.score_block,
        concurrency=CONCURRENCY,
        describe=lambda block: {"num": block.num_rows},
        progress="reward",
    )
    costs = None
    if pairs.clustering is not None:
        costs = cluster_blocks(run, services, m1, pairs.samples, pairs.clusters, pairs.clustering)
    counts = decide_outcomes(pairs)
    lengths = map_blocks(
        pairs.table, pairs.pair_block, concurrency=CONCURRENCY, describe=count_lengths, progress="pair"
    )
    refusals = [f"{num} {reason}" for reason, num in counts.outcomes.items() if reason != "accepted"]
    summary = f"{counts.num_pairs} pairs from {counts.num_prompts} prompts; refused: {', '.join(refusals) or 'none'}"

    # No pair at all may be the fault of an entailment model that does not know this kind of text: the cheap stand-in
    # shows whether the samples do have meanings in common.
    embedding_rate = None
    by_entailment = pairs.clustering is not None and CLUSTERINGS[pairs.clustering].reads == "entailment"
    if by_entailment and counts.num_pairs == 0:
        tried = replace(pairs, clustering=STAND_IN)
        cluster_blocks(run, services, m1, tried.samples, tried.clusters, STAND_IN)
        embedding_rate = decide_outcomes(tried).acceptance_rate
        summary = f"no pair: {summary}; clusters of embeddings would accept {embedding_rate:.0%} of the prompts"

    return run.finish(
        SYNTHESIZE,
        key,
        since=started,
        num_rows=counts.num_pairs,
        metrics=SynthesizeMetrics(
            method=pairs.method,
            num_blocks=pairs.samples.num_blocks,
            num_prompts=counts.num_prompts,
            num_pairs=counts.num_pairs,
            acceptance_rate=counts.acceptance_rate,
            outcomes=counts.outcomes,
            clustering=pairs.clustering,
            gamma=None if pairs.clustering is None else pairs.gamma,
            confidences=counts.confidences,
            cluster_sizes=counts.cluster_sizes,
            num_clusters=counts.num_clusters,
            pairs_by_gamma=counts.pairs_by_gamma,
            entailment=costs,
            lengths=mean_lengths(lengths),
            embedding_acceptance_rate=embedding_rate,
        ),
        summary=summary,
    )


def decide_outcomes(pairs: SyntheticPairs) -> OutcomeCounts:
    """Decide about every prompt, and count the outcomes."""
    counts = map_blocks(
        pairs.outcomes,
        pairs.outcome_block,
        concurrency=CONCURRENCY,
        describe=count_outcomes,
        progress="pair",
    )
    return add_counts(counts)
