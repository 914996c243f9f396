"""Stage pseudo_label: the evaluator scores every response, and the scores become preference pairs.

Scoring a block keeps it; pairing a block keeps it. So DPO can stream the pairs while they are made (`overlap`), read
them when all are there (`alternate`), see them again in the second epoch or after a restart: nothing is scored twice.

With `pseudo_label.synthetic` as many blocks follow: the pairs of synthetic preference generation on the same responses
and scores, those left out that are pairs already. They need every score, so that only the pairing is streamed then.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from rayrl.algorithms.pairing import num_pairs_planned
from rayrl.data.blocks import BlockTable, map_blocks
from rayrl.fleets.services import Services
from rayrl.records import Checkpoint
from rayrl.runs.run import Run
from rayrl.stages.artifacts import Judgements, Responses
from rayrl.stages.proxy.fit_evaluator import labels
from rayrl.stages.proxy.pair_blocks import Labelling, count_pairs, count_scores
from rayrl.stages.rewards.evaluator import Evaluator
from rayrl.stages.synthesis.synthesize import synthesize_preferences
from rayrl.stages.synthesis.synthetic_pairs import BlockRewards

CONCURRENCY = 4
"""Blocks in flight where nobody has to be asked."""


@dataclass(frozen=True, kw_only=True)
class Pairs:
    """The preference pairs P, made or still to be made."""

    key: str
    table: BlockTable
    labelling: Labelling
    mode: str
    num_planned: int
    num_done: int | None
    """Pairs there are, once all blocks are done."""


def pseudo_label(
    run: Run,
    services: Services,
    policy: Checkpoint,
    evaluator: Checkpoint | None,
    responses: Responses,
    paid: Sequence[Judgements],
) -> Pairs:
    """P: in mode `alternate` all pairs are made now; in mode `overlap` DPO makes them as it reads them.

    Args:
        run: the run.
        services: fleets.
        policy: whose responses these are, M1 in the first round.
        evaluator: scores what the expert has not; None under the controls "direct" and "expert".
        responses: Y.
        paid: the judgements of all rounds so far. What the expert said of a response counts wherever it is said again.
    """
    config = run.config
    version = evaluator.version if evaluator else config.labels
    added = [config.refresh.spg] if config.pseudo_label.synthetic else []
    keys = [of_round.key for of_round in paid]
    key = run.key("pseudo_label", config.pseudo_label, version, responses.key, *keys, config.labels, *added)
    done = run.finished("pseudo_label", key)
    scorer = None
    if done is None and evaluator is not None:
        scorer = Evaluator(checkpoint=evaluator, m1=policy, config=config).serve(services)
    folder = run.folder("pseudo_label")
    num_blocks = responses.table.num_blocks
    labelling = Labelling(
        responses=responses.table,
        scored=BlockTable(f"{folder}/scored-{version}", num_blocks),
        pairs=BlockTable(f"{folder}/table", num_blocks * (1 + config.pseudo_label.synthetic)),
        scorer=scorer,
        expert={j.said: j.score for j in labels(run, paid) if j.score is not None},
        config=config.pseudo_label,
    )
    num_planned = num_pairs_planned(config.pseudo_label.pairing, responses.num_prompts, config.generate.k)
    if config.pseudo_label.synthetic:
        rewards = BlockRewards(key=key, table=labelling.scored, compute=labelling.score_block)
        synthetic = synthesize_preferences(run, services, policy, rewards, responses)
        labelling = replace(labelling, synthetic=synthetic.table)
        num_planned += synthetic.num_pairs
    pairs = Pairs(
        key=key,
        table=labelling.pairs,
        labelling=labelling,
        mode=services.mode,
        num_planned=num_planned,
        num_done=done.num_rows if done else None,
    )
    return finish_pairs(run, pairs) if services.mode == "alternate" and done is None else pairs


def finish_pairs(run: Run, pairs: Pairs) -> Pairs:
    """Make the blocks that are not there yet, count, and write the manifest."""
    if pairs.num_done is not None:
        return pairs
    started = time.monotonic()
    labelling = pairs.labelling
    concurrency = labelling.scorer.concurrency if labelling.scorer else CONCURRENCY
    counts = map_blocks(
        pairs.table, labelling.pair_block, concurrency=concurrency, describe=count_pairs, progress="pair"
    )
    scored = map_blocks(
        labelling.scored, labelling.score_block, concurrency=CONCURRENCY, describe=count_scores, progress="count"
    )
    labelled, added = counts[: len(scored)], counts[len(scored) :]
    num_synthetic = sum(count["num_pairs"] for count in added)
    num_pairs = sum(count["num_pairs"] for count in labelled) + num_synthetic
    metrics: dict[str, Any] = {name: sum(c[name] for c in scored) for name in scored[0]}
    metrics |= {"num_pairs": num_pairs, "mode": pairs.mode}
    metrics["num_ties"] = metrics["num_prompts"] - sum(c["num_paired_prompts"] for c in labelled)
    if labelling.synthetic is not None:
        metrics["num_synthetic"] = num_synthetic
    per_query = num_pairs / max(1, len(labelling.expert))
    synthetic = f", {num_synthetic} of them synthetic," if labelling.synthetic is not None else ""
    run.finish(
        "pseudo_label",
        pairs.key,
        since=started,
        num_rows=num_pairs,
        metrics=metrics | {"pairs_per_query": per_query},
        summary=f"{num_pairs} pairs{synthetic} from {metrics['num_scored']} scored responses, {per_query:.1f} per paid "
        f"query; {metrics['num_ties']} prompts tied",
    )
    return replace(pairs, num_done=num_pairs)
