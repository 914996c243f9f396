"""Stage pseudo_label: the evaluator scores every response, and the scores become preference pairs.

Scoring a block keeps it; pairing a block keeps it. So DPO can stream the pairs while they are made (`overlap`), read
them when all are there (`alternate`), see them again in the second epoch or after a restart: nothing is scored twice.
"""

import time
from dataclasses import dataclass, replace
from typing import Any

import pyarrow as pa

from rayrl.actors.services import Services
from rayrl.algorithms.pairing import best_worst, margin_pairs, num_pairs_planned
from rayrl.config import PseudoLabelConfig
from rayrl.data.blocks import BlockTable, map_blocks
from rayrl.data.tokenizing import context_length
from rayrl.records import Checkpoint, PreferencePair, to_table
from rayrl.runs.run import Run
from rayrl.stages.fit_evaluator import labels
from rayrl.stages.generate import Responses
from rayrl.stages.query import Judgements
from rayrl.stages.score import Scored, Scorer, make_scorer

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
    expert: dict[str, float]
    """Scores of the paid responses by response id."""
    config: PseudoLabelConfig

    def pair_block(self, block: int) -> pa.Table:
        """One block's pairs, scored and kept on the way."""
        scored = self.scored.memoised(block, self.score_block).to_pylist()
        sampled = self.responses.read(block).to_pylist()
        pairs = [pair for s, row in zip(scored, sampled, strict=True) for pair in pairs_of(row, s, self.config)]
        return to_table(pairs, PreferencePair)

    def score_block(self, block: int) -> pa.Table:
        """Scores of one block: the expert's where it was paid for one, else the evaluator's, else none."""
        rows = self.responses.read(block).to_pylist()
        unknown = [
            Scored(
                prompt=row["prompt"],
                response=response["text"],
                token_ids=row["prompt_token_ids"] + response["token_ids"],
            )
            for row in rows
            for response in row["responses"]
            if response["id"] not in self.expert
        ]
        predicted = iter(self.scorer.score(unknown) if self.scorer else [None] * len(unknown))
        scored = []
        for row in rows:
            ids = [response["id"] for response in row["responses"]]
            scored.append(
                {
                    "prompt_id": row["prompt_id"],
                    "scores": [self.expert[i] if i in self.expert else next(predicted) for i in ids],
                    "sources": ["expert" if i in self.expert else "evaluator" for i in ids],
                }
            )
        return pa.Table.from_pylist(scored, schema=SCORED_SCHEMA)


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
    run: Run, services: Services, m1: Checkpoint, evaluator: Checkpoint | None, responses: Responses, paid: Judgements
) -> Pairs:
    """P: in mode `alternate` all pairs are made now; in mode `overlap` DPO makes them as it reads them."""
    config = run.config
    version = evaluator.version if evaluator else config.labels
    key = run.key("pseudo_label", config.pseudo_label, version, responses.key, paid.key, config.labels)
    done = run.finished("pseudo_label", key)
    scorer = None
    if done is None and evaluator is not None:
        scorer = make_scorer(run, services, m1, evaluator, context_length(run.config.policy))
    folder = run.folder("pseudo_label")
    num_blocks = responses.table.num_blocks
    labelling = Labelling(
        responses=responses.table,
        scored=BlockTable(f"{folder}/scored-{version}", num_blocks),
        pairs=BlockTable(f"{folder}/table", num_blocks),
        scorer=scorer,
        expert={j.response_id: j.score for j in labels(run, paid) if j.score is not None},
        config=config.pseudo_label,
    )
    pairs = Pairs(
        key=key,
        table=labelling.pairs,
        labelling=labelling,
        mode=services.mode,
        num_planned=num_pairs_planned(config.pseudo_label.pairing, responses.num_prompts, config.generate.k),
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
    num_pairs = sum(count["num_pairs"] for count in counts)
    metrics: dict[str, Any] = {name: sum(c[name] for c in scored) for name in scored[0]}
    metrics |= {"num_pairs": num_pairs, "mode": pairs.mode}
    metrics["num_ties"] = metrics["num_prompts"] - sum(c["num_paired_prompts"] for c in counts)
    per_query = num_pairs / max(1, len(labelling.expert))
    run.finish(
        "pseudo_label",
        pairs.key,
        since=started,
        num_rows=num_pairs,
        metrics=metrics | {"pairs_per_query": per_query},
        summary=f"{num_pairs} pairs from {metrics['num_scored']} scored responses, {per_query:.1f} per paid query; "
        f"{metrics['num_ties']} prompts tied",
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
    better, worse = row["responses"][chosen], row["responses"][rejected]
    sources = {scored["sources"][chosen], scored["sources"][rejected]}
    return PreferencePair(
        prompt_id=row["prompt_id"],
        prompt=row["prompt"],
        prompt_token_ids=row["prompt_token_ids"],
        chosen_id=better["id"],
        rejected_id=worse["id"],
        chosen=better["text"],
        rejected=worse["text"],
        chosen_token_ids=better["token_ids"],
        rejected_token_ids=worse["token_ids"],
        chosen_score=scored["scores"][chosen],
        rejected_score=scored["scores"][rejected],
        chosen_reference_logprob=better["logprob"],
        rejected_reference_logprob=worse["logprob"],
        source=sources.pop() if len(sources) == 1 else "mixed",
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
