"""A panel as the oracle: several judges are asked about each item, and what they say is combined.

A judge that fails is a failed panel: an item that only some could judge would be measured by another scale. An item on
which a judge abstains is combined of what the others say, if at least half of the judges have a score.
"""

import asyncio
import statistics
from collections.abc import Awaitable, Sequence
from dataclasses import replace

from rayrl.config import PanelOracleConfig
from rayrl.models.judge_prompt import Rubric
from rayrl.oracles.build import build_oracle
from rayrl.oracles.protocol import Verdict
from rayrl.oracles.samples import Combine, combined, majority, mean


class PanelOracle:
    """Asks all its judges at once."""

    def __init__(self, config: PanelOracleConfig, rubric: Rubric) -> None:
        self._judges = [build_oracle(judge, rubric) for judge in config.judges]
        self._combine_scores = mean if config.combine == "mean" else most_frequent
        how = "" if config.combine == "mean" else f" by {config.combine}"
        self.name = f"panel{how}: {', '.join(judge.name for judge in self._judges)}"
        self.comparer = f"panel: {', '.join(judge.comparer for judge in self._judges)}"

    def check(self) -> None:
        for judge in self._judges:
            judge.check()

    def estimate_usd(self, prompt: str, response: str, second: str | None = None) -> float | None:
        bounds = [judge.estimate_usd(prompt, response, second) for judge in self._judges]
        known = [bound for bound in bounds if bound is not None]
        return sum(known) if len(known) == len(bounds) else None

    async def judge(self, prompt: str, response: str) -> Verdict:
        return await self._ask([judge.judge(prompt, response) for judge in self._judges], self._combine_scores)

    async def compare(self, prompt: str, first: str, second: str) -> Verdict:
        return await self._ask([judge.compare(prompt, first, second) for judge in self._judges], majority)

    async def _ask(self, calls: Sequence[Awaitable[Verdict]], combine: Combine) -> Verdict:
        verdicts = await asyncio.gather(*calls)
        total = combined(verdicts, len(verdicts), combine, of="judges")
        failed = any(verdict.failure is not None and verdict.score is None for verdict in verdicts)
        return replace(total, score=None) if failed else total


def most_frequent(scores: Sequence[float]) -> float:
    """Return the score of more than half of the judges; without one, their median."""
    most = statistics.mode(scores)
    return most if 2 * scores.count(most) > len(scores) else statistics.median(scores)
