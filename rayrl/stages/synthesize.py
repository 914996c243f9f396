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
from typing import TYPE_CHECKING, Any

from rayrl.actors.services import Services
from rayrl.data.blocks import BlockTable, map_blocks
from rayrl.data.tokenizing import context_length
from rayrl.models.judge import load_rubric
from rayrl.records import Checkpoint
from rayrl.runs.run import Manifest, Run
from rayrl.stages.cluster import cluster
from rayrl.stages.generate import Responses
from rayrl.stages.preferences import Preferences
from rayrl.stages.score import Scorer, make_scorer
from rayrl.stages.synthetic_pairs import SyntheticPairs
from rayrl.stages.tally import count_lengths, mean_lengths, merge, tally

if TYPE_CHECKING:
    from rayrl.training.rollout import Rewards

STAGE = "synthesize"
CONCURRENCY = 4
"""Blocks in flight where no fleet of this stage says otherwise."""


def synthesize_preferences(
    run: Run,
    services: Services,
    m1: Checkpoint,
    rewards: "Rewards",
    samples: Responses,
    *,
    reward_key: str | None = None,
) -> Preferences:
    """D^: at most one pair for every prompt of the samples.

    Args:
        run: the run; `refresh.method` and `refresh.spg` say how.
        services: fleets; `rewards` holds one of them already, and in mode `alternate` may find it gone afterwards.
        m1: embeds the responses, if embeddings are clustered and no other embedder is named.
        rewards: the reward model that the policy behind the samples was trained with; for the method "self_judged",
            `self_judge`.
        samples: n responses of the policy for each prompt.
        reward_key: names the rewards' work, unless it is in the version of the policy behind the samples.
    """
    config = run.config.refresh
    judge = f"{load_rubric(run.config.rubric).version} {run.config.evaluator.scoring}"
    judge = judge if config.method == "self_judged" else None
    key = run.key(STAGE, config.method, config.spg, judge, reward_key, m1.version, samples.key)
    table = _table(run, samples.table, "table")
    done = run.finished(STAGE, key)
    if done is None:
        pairs = SyntheticPairs(
            method=config.method,
            gamma=config.spg.gamma,
            seed=run.config.seed,
            m1_version=m1.version,
            rewards=rewards,
            samples=samples.table,
            scored=_table(run, samples.table, "scored"),
            clusters=None,
            outcomes=_table(run, samples.table, "outcomes"),
            table=table,
        )
        done = _synthesize(run, services, m1, pairs, key)
    return Preferences(key=key, table=table, num_pairs=done.num_rows)


def self_judge(run: Run, services: Services, policy: Checkpoint) -> Scorer:
    """The policy as its own judge: the run's rubric read as by a generative evaluator, with the policy's weights.

    Pointwise, as `evaluator.scoring` says: n answers per prompt instead of the n (n - 1) that comparisons in both
    orders would take. A policy that gives the scores no weight abstains.
    """
    config = run.config.model_copy(update={"evaluator": run.config.evaluator.model_copy(update={"type": "generative"})})
    return make_scorer(replace(run, config=config), services, policy, policy, context_length(config.policy))


def _synthesize(run: Run, services: Services, m1: Checkpoint, pairs: SyntheticPairs, key: str) -> Manifest:
    started = time.monotonic()
    config = run.config.refresh
    map_blocks(
        pairs.scored, pairs.score_block, concurrency=CONCURRENCY, describe=lambda _: {"num": 1}, progress="reward"
    )
    metrics: dict[str, Any] = {"method": config.method}
    if config.method == "spg":
        metrics |= {"clustering": config.spg.clustering, "gamma": config.spg.gamma}
        pairs, costs = _cluster(run, services, m1, pairs, config.spg.clustering)
        metrics |= costs
    metrics |= _outcomes(pairs)
    lengths = map_blocks(
        pairs.table, pairs.pair_block, concurrency=CONCURRENCY, describe=count_lengths, progress="pair"
    )
    metrics |= mean_lengths(lengths)
    refused = ", ".join(f"{n} {reason}" for reason, n in metrics["outcomes"].items() if reason != "accepted")
    summary = f"{metrics['num_pairs']} pairs from {metrics['num_prompts']} prompts; refused: {refused or 'none'}"
    if config.method == "spg" and config.spg.clustering != "embedding" and not metrics["num_pairs"]:
        beside, _ = _cluster(run, services, m1, pairs, "embedding")
        rate = _outcomes(beside)["acceptance_rate"]
        metrics["embedding_acceptance_rate"] = rate
        summary = f"no pair: {summary}; clusters of embeddings would accept {rate:.0%} of the prompts"
    return run.finish(STAGE, key, since=started, num_rows=metrics["num_pairs"], metrics=metrics, summary=summary)


def _cluster(
    run: Run, services: Services, m1: Checkpoint, pairs: SyntheticPairs, clustering: str
) -> tuple[SyntheticPairs, dict[str, Any]]:
    """The pairs to be made from these clusters, and what the clusters cost."""
    clusters = _table(run, pairs.samples, f"clusters-{clustering}")
    costs = cluster(run, services, m1, pairs.samples, clusters, clustering)
    return replace(pairs, clusters=clusters, outcomes=_table(run, pairs.samples, f"outcomes-{clustering}")), costs


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


def _table(run: Run, samples: BlockTable, name: str) -> BlockTable:
    return BlockTable(run.folder(STAGE, name), samples.num_blocks)
