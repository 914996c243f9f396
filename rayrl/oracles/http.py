"""Any OpenAI-compatible chat endpoint as the oracle.

One reserved query pays for at most `num_samples` calls. `rayrl.oracles.endpoints` sends them; here an answer becomes a
verdict. An answer that is not clear abstains, whatever else stands in it, and a judge that fails is no abstention.
"""

import json
import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from rayrl.config import HttpOracleConfig
from rayrl.errors import ConfigError
from rayrl.models.answer_text import without_thoughts
from rayrl.models.json_answers import (
    JSON_FORMAT,
    PAIRWISE_JSON_FORMAT,
    comparison_schema,
    judgement_schema,
    read_json_comparison,
    read_json_judgement,
)
from rayrl.models.judge_prompt import ANSWER_FORMAT, Rubric, oracle_prompt, parse_by_pattern, parse_judgement
from rayrl.models.pairwise_prompt import PAIRWISE_FORMAT, pairwise_prompt, parse_comparison
from rayrl.oracles.completions import Completion, Usage, well_formed
from rayrl.oracles.endpoints import Endpoint, failed_everywhere
from rayrl.oracles.failures import Failure
from rayrl.oracles.protocol import PREFERENCE_SHARES, Verdict
from rayrl.oracles.samples import Combine, combined, has_too_few, majority, mean

logger = logging.getLogger(__name__)

_MAX_REASON = 300
"""Characters kept of an answer or error that became the reason of an abstention."""
_MAX_UNKNOWN = 3
"""Calls of unknown outcome in a row (an endpoint that hangs), after which another endpoint is asked."""
_CHAT_OVERHEAD_TOKENS = 64
"""Allowance for the chat template around one message."""
_CUT_OFF = frozenset({"length", "max_tokens", "model_length", "max_output_tokens"})
"""Values of finish_reason for an answer that reached its limit, in the words of several servers."""
_FILTERED = frozenset({"content_filter", "safety", "sensitive", "recitation", "blocklist", "prohibited_content"})

_Parsed = tuple[float, str] | None
"""Score and rationale of an answer; None if it is not clear."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Question:
    """What is sent, and how the answer is read."""

    text: str
    form: dict[str, Any] | None
    """The `response_format`; None leaves the form free."""
    read: Callable[[str], _Parsed]
    combine: Combine


class HttpOracle:
    """Asks a chat model to judge and to compare. A run has one object, which remembers endpoints that failed."""

    def __init__(self, config: HttpOracleConfig, rubric: Rubric) -> None:
        self._config = config
        self._rubric = rubric
        self._prices = config.prices()
        self._endpoints = [Endpoint(config, endpoint, prefix) for prefix, endpoint in config.endpoints().items()]
        self._current = 0  # place of the endpoint that is asked; those before it have failed
        self._failures: dict[int, Failure] = {}  # the last one of each endpoint that has not answered since
        self._num_unknown = [0] * len(self._endpoints)  # calls of unknown outcome in a row
        self.name = self.comparer = identity(config)

    def __repr__(self) -> str:
        return f"HttpOracle(name={self.name!r}, base_url={self._config.base_url!r})"

    def check(self) -> None:
        """Ask each endpoint for its list of models, which is free. One that can judge is enough."""
        problems = [problem for endpoint in self._endpoints if (problem := endpoint.check()) is not None]
        if len(problems) == len(self._endpoints):
            raise ConfigError("; ".join(problems))
        for problem in problems:
            logger.warning("%s (another endpoint of the oracle can be asked)", problem)

    def estimate_usd(self, prompt: str, response: str, second: str | None = None) -> float | None:
        if self._prices is None:
            return None
        if second is not None:
            question = self._comparison(prompt, response, second)
        else:
            question = self._judgement(prompt, response)
        bound_usd = self._bound_usd(question.text)
        return None if bound_usd is None else self._config.num_samples * bound_usd

    async def judge(self, prompt: str, response: str) -> Verdict:
        return await self._ask(self._judgement(prompt, response))

    async def compare(self, prompt: str, first: str, second: str) -> Verdict:
        return await self._ask(self._comparison(prompt, first, second))

    def _judgement(self, prompt: str, response: str) -> _Question:
        is_json = self._config.answer == "json"
        text = oracle_prompt(self._rubric, prompt, response, form=JSON_FORMAT if is_json else ANSWER_FORMAT)
        form = judgement_schema(self._rubric) if is_json else None
        return _Question(text=well_formed(text), form=form, read=self._read_score, combine=mean)

    def _comparison(self, prompt: str, first: str, second: str) -> _Question:
        is_json = self._config.answer == "json"
        form = PAIRWISE_JSON_FORMAT if is_json else PAIRWISE_FORMAT
        text = pairwise_prompt(self._rubric, prompt, first, second, form=form)
        schema = comparison_schema() if is_json else None
        return _Question(text=well_formed(text), form=schema, read=self._read_preference, combine=majority)

    async def _ask(self, question: _Question) -> Verdict:
        """Ask for all samples, one after the other, so that max_concurrency bounds the calls at once."""
        num_samples = self._config.num_samples
        verdicts: list[Verdict] = []
        while len(verdicts) < num_samples and not has_too_few(verdicts, num_samples):
            verdicts.append(await self._sample(question))
            if verdicts[-1].failure is not None:
                break
        return combined(verdicts, num_samples, question.combine)

    async def _sample(self, question: _Question) -> Verdict:
        """Ask once: the current endpoint, and where it fails, those after it."""
        place, last = self._current, len(self._endpoints) - 1
        while True:
            outcome = await self._endpoints[place].ask(question.text, question.form)
            if isinstance(outcome, Completion):
                # An endpoint that had no answer to this question is left for good once another one has it.
                self._current = max(self._current, place)
                self._failures.pop(place, None)
                self._num_unknown[place] = 0
                return self._verdict(question, outcome, self._endpoints[place])
            self._note_failure(place, outcome)
            if place == last or outcome.kind not in ("judge", "passing"):
                return self._without_answer(question, place, outcome)
            place += 1

    def _note_failure(self, place: int, failure: Failure) -> None:
        """Remember a failed call, and leave an endpoint for good that fails for every question, or hangs."""
        if failure.kind == "item":
            self._num_unknown[place] = 0
            return
        self._failures[place] = failure
        is_hanging = False
        if failure.kind == "unknown":
            self._num_unknown[place] += 1
            is_hanging = self._num_unknown[place] >= _MAX_UNKNOWN
        if place == len(self._endpoints) - 1:
            return
        if failure.kind != "unknown" or (is_hanging and place >= self._current):
            told = failed_everywhere([(self._endpoints[place], failure)])
            logger.warning("%s; asking the next endpoint", told)
        if failure.kind == "judge" or is_hanging:
            self._current = max(self._current, place + 1)

    def _without_answer(self, question: _Question, place: int, failure: Failure) -> Verdict:
        """Abstain, or tell of a failed judge, after the last failure."""
        if failure.kind == "judge":
            told = self._failed_endpoints(sorted(self._failures))
            return Verdict(score=None, rationale=told, billed=False, failure=told, cost_usd=self._nothing_usd)
        rationale = failure.reason[:_MAX_REASON]
        earlier = [other for other in sorted(self._failures) if other < place]
        if failure.kind != "item" and earlier:
            rationale += f"; endpoints that failed before: {self._failed_endpoints(earlier)}"
        verdict = Verdict(
            score=None,
            rationale=rationale,
            billed=failure.kind == "unknown",
            # A call to an endpoint that was left tells nothing about the one that is asked now.
            is_readable=failure.is_declined or (failure.kind == "unknown" and place < self._current),
            cost_usd=self._nothing_usd,
        )
        if not verdict.billed:
            return verdict
        return self._priced(verdict, question, failure.usage, self._endpoints[place])

    def _failed_endpoints(self, places: list[int]) -> str:
        return failed_everywhere((self._endpoints[place], self._failures[place]) for place in places)

    def _verdict(self, question: _Question, completion: Completion, endpoint: Endpoint) -> Verdict:
        """Read an answer, and account for it."""
        verdict = self._read(question, completion)
        # Made well formed here: JSON inside of an answer may hold half a character too.
        verdict = replace(verdict, rationale=endpoint.without_secrets(well_formed(verdict.rationale)))
        return self._priced(verdict, question, completion.usage, endpoint)

    def _priced(self, verdict: Verdict, question: _Question, usage: Usage | None, endpoint: Endpoint) -> Verdict:
        """Account for a call that was, or may have been, billed."""
        bound_usd = self._bound_usd(question.text)
        if usage is None:
            # Without a count of the tokens, the price that is safe to assume.
            return replace(verdict, cost_usd=bound_usd)
        cost_usd = self._cost_usd(usage.input_tokens, usage.output_tokens)
        return replace(
            verdict,
            cost_usd=cost_usd,
            input_tokens=usage.input_tokens,
            output_tokens=usage.output_tokens,
            failure=self._broken_bound(question, usage, endpoint),
        )

    def _read(self, question: _Question, completion: Completion) -> Verdict:
        """Read score and rationale, or why there is none."""
        finish = completion.finish or "not told"
        if not completion.has_choice:
            return _abstained("the answer has no choices")
        if completion.finish in _CUT_OFF:
            return _abstained(
                f"the answer was cut off: oracle.max_tokens = {self._config.max_tokens} was used up "
                f"(finish_reason {finish}); {_more_room(completion)}"
            )
        if completion.finish in _FILTERED:
            return _abstained(f"the judge's filter cut the answer (finish_reason {finish})", is_readable=True)
        if completion.refusal:
            return _abstained(f"the judge refused: {completion.refusal}", is_readable=True)
        if completion.finish in ("tool_calls", "function_call") or (completion.has_tool_call and not completion.text):
            return _abstained(f"the judge called a tool instead of answering (finish_reason {finish})")
        if not completion.text.strip():
            if completion.has_reasoning:
                return _abstained(
                    f"the answer is empty, and the judge's thoughts beside it are not (finish_reason {finish}); "
                    f"{_more_room(completion)}"
                )
            return _abstained(f"the answer is empty (finish_reason {finish})")
        parsed = question.read(completion.text)
        if parsed is not None:
            return Verdict(score=parsed[0], rationale=parsed[1])
        if without_thoughts(completion.text) is None:
            return _abstained(f"the answer ends inside of a thought: {completion.text}")
        return _abstained(f"no clear verdict: {completion.text}")

    def _read_score(self, answer: str) -> _Parsed:
        if self._config.answer == "json":
            parsed = read_json_judgement(answer, self._rubric)
        elif self._rubric.pattern is not None:
            parsed = parse_by_pattern(answer, self._rubric)
        else:
            parsed = parse_judgement(answer, self._rubric)
        return None if parsed is None else (float(parsed[0]), parsed[1])

    def _read_preference(self, answer: str) -> _Parsed:
        parsed = read_json_comparison(answer) if self._config.answer == "json" else parse_comparison(answer)
        return None if parsed is None else (PREFERENCE_SHARES[parsed[0]], parsed[1])

    def _broken_bound(self, question: _Question, usage: Usage, endpoint: Endpoint) -> str | None:
        """Tell of an answer that is longer, or costs more, than was agreed: its price was not reserved."""
        most, num_output = self._config.max_tokens, usage.output_tokens
        cost_usd, bound_usd = self._cost_usd(usage.input_tokens, num_output), self._bound_usd(question.text)
        beyond = ""
        if cost_usd is not None and bound_usd is not None and cost_usd > bound_usd:
            beyond = (
                f", and {cost_usd - bound_usd:.6f} USD more than the {bound_usd:.6f} USD that it could cost at most"
            )
        if num_output <= most and not beyond:
            return None
        if num_output <= most:
            return (
                f"{endpoint.where} counted {usage.input_tokens} prompt tokens, where the question has at most "
                f"{_most_input(question.text)}{beyond}. Something is added to it there, such as a system prompt or a "
                "web search. Remedy: switch that off, or ask an endpoint that sends the question as it is"
            )
        return (
            f"{endpoint.where} gave {num_output} completion tokens, {num_output - most} more than oracle.max_tokens = "
            f"{most}{beyond}. Remedy: raise oracle.max_tokens to what this judge uses, or ask one that keeps to it"
        )

    def _bound_usd(self, question: str) -> float | None:
        """Bound the price of a call: a token is at least one byte of text, an answer has at most `max_tokens`."""
        return self._cost_usd(_most_input(question), self._config.max_tokens)

    def _cost_usd(self, num_input: int, num_output: int) -> float | None:
        """Price a call; None without a price, which is not the price 0."""
        return None if self._prices is None else self._prices.cost_usd(num_input, num_output)

    @property
    def _nothing_usd(self) -> float | None:
        return None if self._prices is None else 0.0


def identity(config: HttpOracleConfig) -> str:
    """Name a judge by its model and all settings that change its answers: a part of the key of a paid answer."""
    parts = [f"http:{config.model}"]
    if config.temperature != 0.0:
        parts.append(f"temperature={config.temperature}")
    if config.answer != "text":
        parts.append(f"answer={config.answer}")
    if config.extra_body:
        parts.append(f"extra_body={json.dumps(config.extra_body, sort_keys=True, separators=(',', ':'))}")
    if config.num_samples > 1:
        parts.append(f"num_samples={config.num_samples}")
    return " ".join(parts)


def _most_input(question: str) -> int:
    """Bound the tokens of a question."""
    return len(question.encode()) + _CHAT_OVERHEAD_TOKENS


def _abstained(reason: str, *, is_readable: bool = False) -> Verdict:
    return Verdict(score=None, rationale=reason[:_MAX_REASON], is_readable=is_readable)


def _more_room(completion: Completion) -> str:
    if completion.has_reasoning or without_thoughts(completion.text) is None:
        return "raise it, or switch thinking off through oracle.extra_body"
    return "raise it"
