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

import pyarrow as pa

from rayrl.actors.services import Services
from rayrl.algorithms.pairing import best_worst, margin_pairs, num_pairs_planned
from rayrl.config import PseudoLabelConfig
from rayrl.data.blocks import BlockTable, map_blocks
from rayrl.records import Checkpoint, PreferencePair, Said, arrow_schema, to_table
from rayrl.runs.run import Run
from rayrl.stages.fit_evaluator import labels
from rayrl.stages.generate import Responses
from rayrl.stages.query import Judgements
from rayrl.stages.score import Evaluator, Scored, Scorer
from rayrl.stages.synthesize import synthesize_preferences
from rayrl.stages.synthetic_pairs import BlockRewards

SCORED_SCHEMA = pa.schema(
    [
        pa.field("prompt_id", pa.string(), nullable=False),
        pa.field("scores", pa.list_(pa.float64()), nullable=False),
        pa.field("sources", pa.list_(pa.field("item", pa.string(), nullable=False)), nullable=False),
    ]
)


@dataclass(frozen=True, kw_only=True)
class Labelling:
    """How blocks of responses become blocks of pairs; travels to the tasks that do it."""

    responses: BlockTable
    scored: BlockTable
    pairs: BlockTable
    scorer: Scorer | None
    """None: only what the expert scored counts (controls "direct" and "expert")."""
    expert: dict[Said, float]
    """Scores of the paid responses."""
    config: PseudoLabelConfig
    synthetic: BlockTable | None = None
    """Synthetic pairs, block by block as the responses."""

    def pair_block(self, block: int) -> pa.Table:
        """One block's pairs, scored and kept on the way; after the last block of responses, its synthetic pairs."""
        if block >= self.responses.num_blocks:
            return self._synthetic_block(block - self.responses.num_blocks)
        scored = self.scored.memoised(block, self.score_block).to_pylist()
        sampled = self.responses.read(block).to_pylist()
        pairs = [pair for s, row in zip(scored, sampled, strict=True) for pair in pairs_of(row, s, self.config)]
        return to_table(pairs, PreferencePair)

    def score_block(self, block: int) -> pa.Table:
        """Scores of one block: the expert's where it was paid for one, else the evaluator's, else none."""
        rows = self.responses.read(block).to_pylist()
        said = [[(row["prompt_id"], response["text"]) for response in row["responses"]] for row in rows]
        unknown = [
            Scored(
                prompt=row["prompt"],
                response=response["text"],
                token_ids=row["prompt_token_ids"] + response["token_ids"],
            )
            for row in rows
            for response in row["responses"]
            if (row["prompt_id"], response["text"]) not in self.expert
        ]
        predicted = iter(self.scorer.score(unknown) if self.scorer else [None] * len(unknown))
        scored = [
            {
                "prompt_id": row["prompt_id"],
                "scores": [self.expert[what] if what in self.expert else next(predicted) for what in of_row],
                "sources": ["expert" if what in self.expert else "evaluator" for what in of_row],
            }
            for row, of_row in zip(rows, said, strict=True)
        ]
        return pa.Table.from_pylist(scored, schema=SCORED_SCHEMA)

    def _synthetic_block(self, block: int) -> pa.Table:
        """One block's synthetic pairs without those that are labelled pairs already."""
        assert self.synthetic is not None
        labelled = self.pairs.memoised(block, self.pair_block).select(["chosen_id", "rejected_id"]).to_pylist()
        there = {(pair["chosen_id"], pair["rejected_id"]) for pair in labelled}
        made = self.synthetic.read(block).to_pylist()
        new = [pair for pair in made if (pair["chosen_id"], pair["rejected_id"]) not in there]
        return pa.Table.from_pylist(new, schema=arrow_schema(PreferencePair))


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
    counts = map_blocks(pairs.table, labelling.pair_block, concurrency=4, describe=_count_pairs, progress="pair")
    scored = map_blocks(
        labelling.scored, labelling.score_block, concurrency=4, describe=_count_scores, progress="count"
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


def pairs_of(row: dict[str, Any], scored: dict[str, Any], config: PseudoLabelConfig) -> list[PreferencePair]:
    """Pairs within one prompt; responses without a score take no part."""
    known = [i for i, score in enumerate(scored["scores"]) if score is not None]
    scores = [scored["scores"][i] for i in known]
    pair = best_worst if config.pairing == "best_worst" else margin_pairs
    return [
        _pair(row, scored, known[chosen], known[rejected])
        for chosen, rejected in (pair(scores, config.min_margin) if len(scores) > 1 else [])
    ]


def _pair(row: dict[str, Any], scored: dict[str, Any], chosen: int, rejected: int) -> PreferencePair:
    sources = {scored["sources"][chosen], scored["sources"][rejected]}
    return PreferencePair.of_responses(
        row,
        row["responses"][chosen],
        row["responses"][rejected],
        source=sources.pop() if len(sources) == 1 else "mixed",
        scores=(scored["scores"][chosen], scored["scores"][rejected]),
    )


def _count_pairs(block: pa.Table) -> dict[str, int]:
    return {"num_pairs": block.num_rows, "num_paired_prompts": len(set(block["prompt_id"].to_pylist()))}


def _count_scores(block: pa.Table) -> dict[str, int]:
    scores = [score for row in block["scores"].to_pylist() for score in row]
    sources = [source for row in block["sources"].to_pylist() for source in row]
    return {
        "num_prompts": block.num_rows,
        "num_scored": sum(score is not None for score in scores),
        "num_abstained": sum(score is None for score in scores),
        "num_expert_scored": sources.count("expert"),
    }
