"""Block work of the stage synthesize: blocks of a policy's samples become blocks of preference pairs.

A block is scored, its prompts are decided about (`rayrl.stages.synthesis.outcomes`), and the accepted ones give pairs.
Each step has a table of its own and reads the tables of the steps before it; clusters are found elsewhere
(`rayrl.stages.synthesis.clusters`).

This runs in tasks of Ray Data, each of them a process: it imports nothing heavy.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice

import pyarrow as pa

from rayrl.data.blocks import BlockTable
from rayrl.metrics import meters
from rayrl.models.served_reward import ServedReward
from rayrl.records import PreferencePair, Row, Sampled, from_table, to_table
from rayrl.runs.stage_metrics import PairLengths
from rayrl.stages.synthesis.outcomes import Outcome, Scores, best_worst_outcome, synthesize_outcome

# Written out, since a schema derived from a record has no nulls in its lists.
SCORED = pa.schema(
    [
        pa.field("prompt_id", pa.string(), nullable=False),
        pa.field("scores", pa.list_(pa.float64()), nullable=False),
    ]
)
"""One row per prompt, one score per response; a null where the reward abstains."""


@dataclass(frozen=True, kw_only=True)
class BlockRewards:
    """Rewards that another stage makes and keeps, to be read from its table."""

    key: str
    """Names that stage's work."""
    table: BlockTable
    """Has the `scores` of each prompt's responses."""
    compute: Callable[[int], pa.Table]
    """Makes a block of the table."""


@dataclass(frozen=True, kw_only=True)
class SyntheticPairs:
    """All that turns blocks of samples into blocks of pairs; travels to the tasks that do it."""

    method: str
    clustering: str | None
    """None: the controls cluster nothing."""
    gamma: float
    seed: int
    m1_version: str
    rewards: ServedReward | BlockRewards
    samples: BlockTable
    folder: str
    """Folder of the tables."""

    @property
    def scored(self) -> BlockTable:
        """Rewards of the responses."""
        return self.rewards.table if isinstance(self.rewards, BlockRewards) else self._table("scored")

    @property
    def clusters(self) -> BlockTable:
        """Clusters of the responses, by the name of the clustering: a second one may lie beside the first."""
        return self._table(f"clusters-{self.clustering}")

    @property
    def outcomes(self) -> BlockTable:
        """One `Outcome` per prompt."""
        return outcomes_table(self.folder, self.clustering, self.samples.num_blocks)

    @property
    def table(self) -> BlockTable:
        """The pairs of the accepted prompts."""
        return pairs_table(self.folder, self.samples.num_blocks)

    def score_block(self, block: int) -> pa.Table:
        """Make a block of the table of rewards."""
        if isinstance(self.rewards, BlockRewards):
            return self.rewards.compute(block)
        prompts = from_table(self.samples.read(block), Sampled)
        items = [item for sampled in prompts for item in sampled.items()]
        scores = iter(self.rewards.score(items))  # one call for the block: the engine batches it
        rows: list[Row] = []
        for sampled in prompts:
            own_scores = list(islice(scores, len(sampled.responses)))
            rows.append({"prompt_id": sampled.prompt_id, "scores": own_scores})
        return pa.Table.from_pylist(rows, schema=SCORED)

    def outcome_block(self, block: int) -> pa.Table:
        """Make a block of the table of outcomes."""
        prompts = from_table(self.samples.read(block), Sampled)
        scores: list[Scores] = self.scored.read(block)["scores"].to_pylist()
        outcomes: list[Outcome] = []
        if self.clustering is None:
            for sampled, own_scores in zip(prompts, scores, strict=True):
                outcomes.append(best_worst_outcome(sampled.prompt_id, own_scores))
        else:
            clusters: list[list[int]] = self.clusters.read(block)["clusters"].to_pylist()
            for sampled, own_clusters, own_scores in zip(prompts, clusters, scores, strict=True):
                outcomes.append(synthesize_outcome(sampled, own_clusters, own_scores, gamma=self.gamma, seed=self.seed))
        return to_table(outcomes, Outcome)

    def pair_block(self, block: int) -> pa.Table:
        """Make a block of the table of pairs: those of the prompts that are accepted."""
        # Rows, not records: most prompts may give no pair, and a pair takes its fields from a row.
        rows = self.samples.read(block).to_pylist()
        outcomes = from_table(self.outcomes.read(block), Outcome)
        scores: list[Scores] = self.scored.read(block)["scores"].to_pylist()
        pairs = [
            self._pair(row, outcome, own_scores)
            for row, outcome, own_scores in zip(rows, outcomes, scores, strict=True)
            if outcome.reason == "accepted"
        ]
        meters.PAIRS.add(len(pairs), source="synthetic")
        return to_table(pairs, PreferencePair)

    def _pair(self, row: Row, outcome: Outcome, scores: Scores) -> PreferencePair:
        assert outcome.chosen is not None and outcome.rejected is not None, "an accepted prompt has both sides"
        better, worse = scores[outcome.chosen], scores[outcome.rejected]
        assert better is not None and worse is not None, "a response without a score is in no pair"
        return PreferencePair.of_responses(
            row,
            self._with_m1_logprob(row["responses"][outcome.chosen]),
            self._with_m1_logprob(row["responses"][outcome.rejected]),
            source=self.method,
            scores=(float(better), float(worse)),
        )

    def _with_m1_logprob(self, response: Row) -> Row:
        """The response with its log p under M1, the reference of a later DPO."""
        if response["policy_version"] == self.m1_version:
            return response  # M1 wrote it: generation has kept its log p
        return response | {"logprob": math.nan}

    def _table(self, name: str) -> BlockTable:
        return BlockTable(f"{self.folder}/{name}", self.samples.num_blocks)


def pairs_table(folder: str, num_blocks: int) -> BlockTable:
    """Name the table of pairs in a folder of the stage."""
    return BlockTable(f"{folder}/table", num_blocks)


def outcomes_table(folder: str, clustering: str | None, num_blocks: int) -> BlockTable:
    """Name the table of outcomes in a folder of the stage: those of one clustering, or of the controls."""
    name = f"outcomes-{clustering}" if clustering else "outcomes"
    return BlockTable(f"{folder}/{name}", num_blocks)


def count_lengths(block: pa.Table) -> dict[str, int]:
    """Count a block of pairs, and the characters and tokens of either side."""
    counts = {"num_pairs": block.num_rows}
    for side in ("chosen", "rejected"):
        counts[f"{side}_chars"] = sum(map(len, block[side].to_pylist()))
        counts[f"{side}_tokens"] = sum(map(len, block[f"{side}_token_ids"].to_pylist()))
    return counts


def mean_lengths(blocks: Sequence[dict[str, int]]) -> PairLengths | None:
    """Average the lengths of both sides over all pairs; None if there is no pair."""
    num_pairs = sum(counts["num_pairs"] for counts in blocks)
    if num_pairs == 0:
        return None

    def mean(name: str) -> float:
        return sum(counts[name] for counts in blocks) / num_pairs

    return PairLengths(
        chosen_chars=mean("chosen_chars"),
        rejected_chars=mean("rejected_chars"),
        chosen_tokens=mean("chosen_tokens"),
        rejected_tokens=mean("rejected_tokens"),
    )
