"""How a block of the policy's samples becomes a block of preference pairs: scored, turned into outcomes, paired."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from rayrl.data.blocks import BlockTable
from rayrl.metrics import meters
from rayrl.models.served_reward import ServedReward
from rayrl.records import PreferencePair, Scored, to_table
from rayrl.stages.synthesis.outcomes import Outcome, best_worst_outcome, synthesize_outcome

SCORED = pa.schema(
    [
        pa.field("prompt_id", pa.string(), nullable=False),
        pa.field("scores", pa.list_(pa.float64()), nullable=False),
    ]
)


@dataclass(frozen=True, kw_only=True)
class BlockRewards:
    """Rewards that another stage keeps: a table with the `scores` of each prompt's responses, and what fills it."""

    key: str
    """Names that stage's work."""
    table: BlockTable
    compute: Callable[[int], pa.Table]


@dataclass(frozen=True, kw_only=True)
class SyntheticPairs:
    """How blocks of samples become blocks of pairs; travels to the tasks that do it."""

    method: str
    clustering: str | None
    """None: the controls cluster nothing."""
    gamma: float
    seed: int
    m1_version: str
    rewards: ServedReward | BlockRewards
    samples: BlockTable
    folder: str
    """Where the tables are."""

    @property
    def scored(self) -> BlockTable:
        """Rewards of the responses."""
        return self.rewards.table if isinstance(self.rewards, BlockRewards) else self._table("scored")

    @property
    def clusters(self) -> BlockTable:
        """Clusters of the responses."""
        return self._table(f"clusters-{self.clustering}")

    @property
    def outcomes(self) -> BlockTable:
        """What became of the prompts."""
        return self._table(f"outcomes-{self.clustering}" if self.clustering else "outcomes")

    @property
    def table(self) -> BlockTable:
        """The pairs."""
        return self._table("table")

    def score_block(self, block: int) -> pa.Table:
        """The reward of every response."""
        if isinstance(self.rewards, BlockRewards):
            return self.rewards.compute(block)
        rows = self.samples.read(block).to_pylist()
        items = [
            Scored(prompt=row["prompt"], response=r["text"], token_ids=row["prompt_token_ids"] + r["token_ids"])
            for row in rows
            for r in row["responses"]
        ]
        rewards = iter(self.rewards.score(items))
        scored = [{"prompt_id": row["prompt_id"], "scores": [next(rewards) for _ in row["responses"]]} for row in rows]
        return pa.Table.from_pylist(scored, schema=SCORED)

    def outcome_block(self, block: int) -> pa.Table:
        """What becomes of every prompt."""
        rows = self.samples.read(block).to_pylist()
        scores = self.scored.read(block)["scores"].to_pylist()
        if self.clustering is None:
            made = [best_worst_outcome(row, of_row) for row, of_row in zip(rows, scores, strict=True)]
        else:
            clusters = self.clusters.read(block)["clusters"].to_pylist()
            made = [
                synthesize_outcome(row, ids, of_row, gamma=self.gamma, seed=self.seed)
                for row, ids, of_row in zip(rows, clusters, scores, strict=True)
            ]
        return to_table(made, Outcome)

    def pair_block(self, block: int) -> pa.Table:
        """The pairs of the prompts that are accepted."""
        columns = (self.samples.read(block), self.outcomes.read(block), self.scored.read(block)["scores"])
        pairs = [
            self._pair(row, outcome, scores)
            for row, outcome, scores in zip(*(column.to_pylist() for column in columns), strict=True)
            if outcome["reason"] == "accepted"
        ]
        meters.PAIRS.add(len(pairs), source="synthetic")
        return to_table(pairs, PreferencePair)

    def _pair(self, row: dict[str, Any], outcome: dict[str, Any], scores: list[float | None]) -> PreferencePair:
        sides = outcome["chosen"], outcome["rejected"]
        chosen, rejected = (self._by_m1(row["responses"][side]) for side in sides)
        better, worse = (float(scores[side]) for side in sides)
        return PreferencePair.of_responses(row, chosen, rejected, source=self.method, scores=(better, worse))

    def _table(self, name: str) -> BlockTable:
        return BlockTable(f"{self.folder}/{name}", self.samples.num_blocks)

    def _by_m1(self, response: dict[str, Any]) -> dict[str, Any]:
        """The response with its log p under M1, which is known where M1 wrote it."""
        return response if response["policy_version"] == self.m1_version else response | {"logprob": math.nan}
