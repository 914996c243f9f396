"""Stage pseudo_label: the evaluator scores every response, and the scores become preference pairs.

A scored block is kept, and so is a block of pairs. DPO can therefore stream the pairs while they are made (mode
`overlap`), read them when all are there (`alternate`), and read them again in the second epoch or after a restart:
nothing is scored twice.

With `pseudo_label.synthetic` as many blocks follow: the pairs of synthetic preference generation on the same responses
and scores, without those that are pairs already. They need every score, so then only the pairing is streamed.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

from rayrl.algorithms.pairing import num_pairs_planned
from rayrl.data.blocks import BlockTable, map_blocks
from rayrl.fleets.services import Services
from rayrl.records import Checkpoint
from rayrl.runs.run import Run
from rayrl.runs.stage_metrics import PseudoLabelMetrics
from rayrl.runs.stage_table import PSEUDO_LABEL
from rayrl.stages.artifacts import Judgements, Responses
from rayrl.stages.proxy.fit_evaluator import training_judgements
from rayrl.stages.proxy.pair_blocks import PairBlocks, count_pairs, count_scores
from rayrl.stages.rewards.evaluator import Evaluator
from rayrl.stages.synthesis.synthesize import BlockRewards, synthesize_preferences

CONCURRENCY = 4
"""Blocks in flight where no fleet has to be asked."""


@dataclass(frozen=True, kw_only=True)
class Pairs:
    """The preference pairs P, made or still to be made."""

    key: str
    blocks: PairBlocks
    mode: str
    num_planned: int
    num_done: int | None
    """Number of pairs once all blocks are made."""

    @property
    def table(self) -> BlockTable:
        """The table of pairs."""
        return self.blocks.pairs


def pseudo_label(
    run: Run,
    services: Services,
    policy: Checkpoint,
    evaluator: Evaluator | None,
    responses: Responses,
    paid: Sequence[Judgements],
) -> Pairs:
    """Make P: all pairs now in mode `alternate`; in mode `overlap` DPO makes them as it reads them.

    Args:
        run: the run.
        services: fleets.
        policy: wrote the responses: M1 in the first round.
        evaluator: scores what the oracle has not; None under the controls "direct" and "expert".
        responses: Y.
        paid: the judgements of all rounds so far. A paid score counts for every response with the same text.
    """
    config = run.config
    version = evaluator.checkpoint.version if evaluator else config.labels
    with_synthetic = config.pseudo_label.synthetic
    judged = [judgements.key for judgements in paid]
    spg = [config.refresh.spg, *run.content("refresh.spg.")] if with_synthetic else [None]
    key = run.key(PSEUDO_LABEL, config.pseudo_label, version, responses.key, *judged, config.labels, *spg)
    done = run.finished(PSEUDO_LABEL, key)
    num_blocks = responses.table.num_blocks
    # Under the control "shuffled" these are the permuted scores: the oracle's own must not leak into the pairs.
    scores = {j.response_key: j.score for j in training_judgements(run, paid)}
    blocks = PairBlocks(
        responses=responses.table,
        scored=BlockTable(run.folder(PSEUDO_LABEL, f"scored-{version}"), num_blocks),
        pairs=BlockTable(run.folder(PSEUDO_LABEL, "table"), 2 * num_blocks if with_synthetic else num_blocks),
        # A finished stage starts no engine.
        scorer=evaluator.serve(services) if evaluator is not None and done is None else None,
        paid={response_key: score for response_key, score in scores.items() if score is not None},
        config=config.pseudo_label,
    )
    num_planned = num_pairs_planned(config.pseudo_label.pairing, responses.num_prompts, config.generate.k)
    if with_synthetic:
        rewards = BlockRewards(key=key, table=blocks.scored, compute=blocks.score_block)
        synthetic = synthesize_preferences(run, services, policy, rewards, responses)
        blocks = replace(blocks, synthetic=synthetic.table)
        num_planned += synthetic.num_pairs
    pairs = Pairs(
        key=key,
        blocks=blocks,
        mode=services.mode,
        num_planned=num_planned,
        num_done=done.metrics.num_pairs if done else None,
    )
    return finish_pairs(run, pairs) if services.mode == "alternate" else pairs


def finish_pairs(run: Run, pairs: Pairs) -> Pairs:
    """Make the blocks that are missing, count, and write the manifest; nothing is left to do for finished pairs."""
    if pairs.num_done is not None:
        return pairs
    started = time.monotonic()
    blocks = pairs.blocks
    concurrency = blocks.scorer.concurrency if blocks.scorer else CONCURRENCY
    pair_counts = map_blocks(
        blocks.pairs, blocks.pair_block, concurrency=concurrency, describe=count_pairs, progress="pair"
    )
    score_counts = map_blocks(
        blocks.scored, blocks.score_block, concurrency=CONCURRENCY, describe=count_scores, progress="count"
    )
    # Blocks of scores that a killed driver left are read, not scored again.
    total = {name: sum(block[name] for block in score_counts) for name in score_counts[0]}
    # The blocks of the responses come first, then those of the synthetic pairs.
    labelled, added = pair_counts[: len(score_counts)], pair_counts[len(score_counts) :]
    num_synthetic = sum(block["num_pairs"] for block in added)
    num_pairs = sum(block["num_pairs"] for block in labelled) + num_synthetic
    num_paired_prompts = sum(block["num_paired_prompts"] for block in labelled)
    metrics = PseudoLabelMetrics(
        **total,
        num_pairs=num_pairs,
        num_synthetic=num_synthetic,
        num_ties=total["num_prompts"] - num_paired_prompts,
        pairs_per_query=num_pairs / max(1, len(blocks.paid)),
        mode=pairs.mode,
    )
    synthetic = f", {num_synthetic} of them synthetic," if blocks.synthetic is not None else ""
    too_long = f"; {metrics.num_too_long} responses too long for the evaluator" if metrics.num_too_long else ""
    run.finish(
        PSEUDO_LABEL,
        pairs.key,
        since=started,
        num_rows=num_pairs,
        metrics=metrics,
        summary=f"{num_pairs} pairs{synthetic} from {metrics.num_scored} scored responses, "
        f"{metrics.pairs_per_query:.1f} per paid query; {metrics.num_ties} prompts tied{too_long}",
    )
    return replace(pairs, num_done=num_pairs)
