"""Blocks of responses to blocks of preference pairs: score each response, then pair within each prompt.

This is the work of Ray Data tasks, each a process of its own, so the module imports nothing heavy.
"""

from dataclasses import dataclass
from typing import Any, TypedDict

import pyarrow as pa

from rayrl.algorithms.pairing import PAIRINGS
from rayrl.config import PseudoLabelConfig
from rayrl.data.blocks import BlockTable
from rayrl.metrics import meters
from rayrl.models.served_reward import Reasons
from rayrl.records import PreferencePair, ResponseKey, Scored, arrow_schema, to_table
from rayrl.stages.rewards.evaluator import Scorer

SCORED_SCHEMA = pa.schema(
    [
        pa.field("prompt_id", pa.string(), nullable=False),
        pa.field("scores", pa.list_(pa.float64()), nullable=False),
        pa.field("sources", pa.list_(pa.field("item", pa.string(), nullable=False)), nullable=False),
    ]
)


class ScoredRow(TypedDict):
    """The scores of one prompt's responses."""

    prompt_id: str
    scores: list[float | None]
    """None: no score, and no part in any pair."""
    sources: list[str]
    """"oracle" where the score was paid for, else "evaluator"; "too_long" where the evaluator's context was."""


@dataclass(frozen=True, kw_only=True)
class PairBlocks:
    """The tables and the scorer that make pairs of responses. Travels to the tasks."""

    responses: BlockTable
    scored: BlockTable
    pairs: BlockTable
    scorer: Scorer | None
    """None: only scores of the oracle count (controls "direct" and "expert")."""
    paid: dict[ResponseKey, float]
    """Scores of the judged responses."""
    config: PseudoLabelConfig
    synthetic: BlockTable | None = None
    """Synthetic pairs, one block for each block of responses."""

    def pair_block(self, block: int) -> pa.Table:
        """Make one block of pairs, scoring it on the way.

        Blocks beyond those of the responses are the synthetic pairs', in the same order.
        """
        if block >= self.responses.num_blocks:
            return self._synthetic_block(block - self.responses.num_blocks)
        scored = self.scored.memoised(block, self.score_block).to_pylist()
        responses = self.responses.read(block).to_pylist()
        pairs: list[PreferencePair] = []
        for row, scores in zip(responses, scored, strict=True):
            pairs += pairs_of(row, scores, self.config)
        meters.PAIRS.add(len(pairs), source="labelled")
        return to_table(pairs, PreferencePair)

    def score_block(self, block: int) -> pa.Table:
        """Score one block: the oracle's score where it was paid for, else the evaluator's, else none."""
        rows = self.responses.read(block).to_pylist()
        unpaid = [
            Scored(
                prompt=row["prompt"],
                response=response["text"],
                token_ids=row["prompt_token_ids"] + response["token_ids"],
            )
            for row in rows
            for response in row["responses"]
            if (row["prompt_id"], response["text"]) not in self.paid
        ]
        # One call for the whole block; the scores come back in the order of `unpaid`.
        reasons: Reasons = {}
        predicted = iter(self.scorer.score(unpaid, reasons) if self.scorer else [None] * len(unpaid))
        sources_of_unpaid = iter([reasons.get(number, "evaluator") for number in range(len(unpaid))])
        scored: list[ScoredRow] = []
        for row in rows:
            scores: list[float | None] = []
            sources: list[str] = []
            for response in row["responses"]:
                response_key = row["prompt_id"], response["text"]
                is_paid = response_key in self.paid
                scores.append(self.paid[response_key] if is_paid else next(predicted))
                sources.append("oracle" if is_paid else next(sources_of_unpaid))
                meters.SCORED.add(source="none" if scores[-1] is None else sources[-1])
            scored.append(ScoredRow(prompt_id=row["prompt_id"], scores=scores, sources=sources))
        return pa.Table.from_pylist(scored, schema=SCORED_SCHEMA)

    def _synthetic_block(self, block: int) -> pa.Table:
        """Return one block's synthetic pairs without those that are labelled pairs already."""
        assert self.synthetic is not None
        columns = ["chosen_id", "rejected_id"]
        # Ray may run this task before that of the labelled block, which is then made here and kept.
        labelled = self.pairs.memoised(block, self.pair_block).select(columns).to_pylist()
        known = {(pair["chosen_id"], pair["rejected_id"]) for pair in labelled}
        made = self.synthetic.read(block).to_pylist()
        new = [pair for pair in made if (pair["chosen_id"], pair["rejected_id"]) not in known]
        return pa.Table.from_pylist(new, schema=arrow_schema(PreferencePair))


def pairs_of(row: dict[str, Any], scored: ScoredRow, config: PseudoLabelConfig) -> list[PreferencePair]:
    """Pair the responses of one row of a responses table; those without a score take no part."""
    responses, scores = row["responses"], scored["scores"]
    pairs: list[PreferencePair] = []
    for chosen, rejected in PAIRINGS[config.pairing].pairs(scores, config.min_margin):
        chosen_score, rejected_score = scores[chosen], scores[rejected]
        assert chosen_score is not None and rejected_score is not None, "an abstention takes part in no pair"
        sources = {scored["sources"][chosen], scored["sources"][rejected]}
        pairs.append(
            PreferencePair.of_responses(
                row,
                responses[chosen],
                responses[rejected],
                # A pair with one paid side is told apart from pairs of either kind.
                source=sources.pop() if len(sources) == 1 else "mixed",
                scores=(chosen_score, rejected_score),
            )
        )
    return pairs


def count_pairs(block: pa.Table) -> dict[str, int]:
    """Count what the driver learns of a block of pairs."""
    return {"num_pairs": block.num_rows, "num_paired_prompts": len(set(block["prompt_id"].to_pylist()))}


def count_scores(block: pa.Table) -> dict[str, int]:
    """Count what the driver learns of a block of scores."""
    scores = [score for row in block["scores"].to_pylist() for score in row]
    sources = [source for row in block["sources"].to_pylist() for source in row]
    num_scored = sum(score is not None for score in scores)
    return {
        "num_prompts": block.num_rows,
        "num_scored": num_scored,
        "num_abstained": len(scores) - num_scored,
        "num_too_long": sources.count("too_long"),
        "num_oracle_scored": sources.count("oracle"),
    }
