"""How a block of responses becomes a block of preference pairs: score, then pair within each prompt.

What the tasks of Ray Data do; it imports nothing heavy, for each of them is a process.
"""

from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from rayrl.algorithms.pairing import best_worst, margin_pairs
from rayrl.config import PseudoLabelConfig
from rayrl.data.blocks import BlockTable
from rayrl.metrics import meters
from rayrl.records import PreferencePair, Said, arrow_schema, to_table
from rayrl.stages.rewards.evaluator import Scored, Scorer

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
        meters.PAIRS.add(len(pairs), source="labelled")
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
        for row in scored:
            for score, source in zip(row["scores"], row["sources"], strict=True):
                meters.SCORED.add(source="none" if score is None else source)
        return pa.Table.from_pylist(scored, schema=SCORED_SCHEMA)

    def _synthetic_block(self, block: int) -> pa.Table:
        """One block's synthetic pairs without those that are labelled pairs already."""
        assert self.synthetic is not None
        labelled = self.pairs.memoised(block, self.pair_block).select(["chosen_id", "rejected_id"]).to_pylist()
        there = {(pair["chosen_id"], pair["rejected_id"]) for pair in labelled}
        made = self.synthetic.read(block).to_pylist()
        new = [pair for pair in made if (pair["chosen_id"], pair["rejected_id"]) not in there]
        return pa.Table.from_pylist(new, schema=arrow_schema(PreferencePair))


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


def count_pairs(block: pa.Table) -> dict[str, int]:
    """What the driver learns of a block of pairs."""
    return {"num_pairs": block.num_rows, "num_paired_prompts": len(set(block["prompt_id"].to_pylist()))}


def count_scores(block: pa.Table) -> dict[str, int]:
    """What the driver learns of a block of scores."""
    scores = [score for row in block["scores"].to_pylist() for score in row]
    sources = [source for row in block["sources"].to_pylist() for source in row]
    return {
        "num_prompts": block.num_rows,
        "num_scored": sum(score is not None for score in scores),
        "num_abstained": sum(score is None for score in scores),
        "num_expert_scored": sources.count("expert"),
    }
