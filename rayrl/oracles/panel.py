"""A panel as the oracle: several judges are asked about each item, and what they say is combined.

A judge that fails is a failed panel: an item that only some could judge would be measured by another scale. So is one
whose answers nobody can read, several in a row. An item on which a judge abstains is combined of what the others say,
if at least half of the judges have a score.
"""

import asyncio
import re
from collections.abc import Awaitable, Sequence
from dataclasses import replace

from rayrl.config import OracleBase, PanelOracleConfig
from rayrl.errors import ConfigError, DataError
from rayrl.models.judge_prompt import Rubric
from rayrl.oracles.build import build_oracle
from rayrl.oracles.protocol import Oracle, Verdict
from rayrl.oracles.samples import Combine, combined, majority, mean, most_frequent


class PanelOracle:
    """Asks all its judges at once."""

    def __init__(self, config: PanelOracleConfig, rubric: Rubric) -> None:
        self._judges = [_Judge(judge, rubric, place, config) for place, judge in enumerate(config.judges)]
        self._combine_scores = mean if config.combine == "mean" else most_frequent
        how = "" if config.combine == "mean" else f" by {config.combine}"
        self.name = f"panel{how}: {', '.join(judge.oracle.name for judge in self._judges)}"
        self.comparer = f"panel: {', '.join(judge.oracle.comparer for judge in self._judges)}"

    def check(self) -> None:
        for judge in self._judges:
            judge.check()

    def estimate_usd(self, prompt: str, response: str, second: str | None = None) -> float | None:
        bounds = [judge.oracle.estimate_usd(prompt, response, second) for judge in self._judges]
        known = [bound for bound in bounds if bound is not None]
        return sum(known) if len(known) == len(bounds) else None

    async def judge(self, prompt: str, response: str) -> Verdict:
        return await self._ask([judge.oracle.judge(prompt, response) for judge in self._judges], self._combine_scores)

    async def compare(self, prompt: str, first: str, second: str) -> Verdict:
        return await self._ask([judge.oracle.compare(prompt, first, second) for judge in self._judges], majority)

    async def _ask(self, calls: Sequence[Awaitable[Verdict]], combine: Combine) -> Verdict:
        answers = await asyncio.gather(*calls)
        verdicts = [judge.noted(verdict) for judge, verdict in zip(self._judges, answers, strict=True)]
        total = combined(verdicts, len(verdicts), combine, of="judges")
        failed = any(verdict.failure is not None and verdict.score is None for verdict in verdicts)
        return replace(total, score=None) if failed else total


class _Judge:
    """One judge of a panel: names its settings by their place, and counts its answers that nobody can read."""

    def __init__(self, config: OracleBase, rubric: Rubric, place: int, panel: PanelOracleConfig) -> None:
        self._where = f"oracle.judges[{place}]"
        # Its own settings alone: an address may have a host that is named oracle.
        names = "|".join(type(config).model_fields)
        self._setting = re.compile(rf"(?<![\w./@:-])oracle\.(?=(?:{names})\b)")
        self._label = config.label()
        self._max_unreadable = panel.max_unreadable
        self._num_unreadable = 0
        try:
            self.oracle: Oracle = build_oracle(config, rubric)
        except (ConfigError, DataError) as error:
            raise type(error)(self._named(str(error))) from None

    def check(self) -> None:
        try:
            self.oracle.check()
        except (ConfigError, DataError) as error:
            raise type(error)(self._named(str(error))) from None

    def noted(self, verdict: Verdict) -> Verdict:
        """Note a verdict; it is a failed judge's if it is one of too many in a row that nobody can read.

        The other judges' answers would hide it from those who see the panel's verdicts alone.
        """
        if verdict.failure is not None:
            return replace(verdict, failure=self._named(verdict.failure), rationale=self._reason(verdict))
        self._num_unreadable = 0 if verdict.is_readable else self._num_unreadable + 1
        failure = None
        if self._num_unreadable >= self._max_unreadable:
            failure = (
                f"{self._where} ({self._label}): {self._num_unreadable} answers in a row could not be read "
                f"(oracle.max_unreadable), the last one because: {self._reason(verdict)}"
            )
        return replace(verdict, rationale=self._reason(verdict), failure=failure)

    def _reason(self, verdict: Verdict) -> str:
        return self._named(verdict.rationale) if verdict.score is None else verdict.rationale

    def _named(self, message: str) -> str:
        """Name the settings in a message by the judge's place: oracle.model is oracle.judges[0].model."""
        return self._setting.sub(f"{self._where}.", message)
