"""Any OpenAI-compatible chat endpoint as the oracle.

One reserved query is at most one call that may cost money. A call that surely cost nothing (a refused connection, an
error status) is tried again with exponential backoff and jitter. A call whose outcome is unknown (no answer in time, a
connection lost after the question was sent) is not tried again: it counts as paid, at its estimated price.
"""

import asyncio
from collections.abc import Callable
from dataclasses import replace
from typing import TypedDict
from urllib.parse import urlsplit

import openai
import tenacity
from pydantic import BaseModel, Field, ValidationError

from rayrl.config import HttpOracleConfig
from rayrl.errors import ConfigError
from rayrl.models.judge_prompt import Rubric, oracle_prompt, parse_judgement
from rayrl.models.pairwise_prompt import pairwise_prompt, parse_comparison
from rayrl.oracles.keys import read_key
from rayrl.oracles.limits import RateLimit
from rayrl.oracles.protocol import PREFERENCE_SHARES, Verdict
from rayrl.oracles.retries import may_retry, wait_s, was_sent

_CHECK_TIMEOUT_S = 20.0
_CONNECT_TIMEOUT_S = 10.0
_OUT_OF_SERVICE = frozenset({500, 502, 503, 504})
_MAX_REASON = 300
"""Characters kept of an answer or error that became the reason of an abstention."""
_CHAT_OVERHEAD_TOKENS = 64
"""Allowance for the chat template around one message."""

_Parsed = tuple[float, str] | None
"""Score and rationale of an answer; None if it is not clear."""


class _Connection(TypedDict):
    """Settings of the SDK's client."""

    base_url: str
    api_key: str
    max_retries: int
    timeout: openai.Timeout


class _Message(BaseModel):
    content: str | None = None


class _Choice(BaseModel):
    message: _Message


class _Usage(BaseModel):
    prompt_tokens: int = Field(ge=0)
    completion_tokens: int = Field(ge=0)


class _Completion(BaseModel):
    """The part of a chat completion that is read here; compatible servers differ in the rest."""

    choices: list[_Choice] = Field(min_length=1)
    usage: _Usage | None = None


class HttpOracle:
    """Asks a chat model to judge and to compare. The limits hold for one object, of which a run has one."""

    def __init__(self, config: HttpOracleConfig, rubric: Rubric) -> None:
        _require_plain_url(config.base_url)
        self._config = config
        self._prices = config.prices()
        self._rubric = rubric
        self._key = read_key(config.api_key_env)
        self._headers = {"Authorization": openai.Omit()} if self._key is None else {}
        self._requests = RateLimit(config.requests_per_minute)
        self._tokens = RateLimit(config.tokens_per_minute)
        self._client = openai.AsyncOpenAI(**self._connection(config.timeout_s))
        self.name = self.comparer = f"http:{config.model}"

    def __repr__(self) -> str:
        return f"HttpOracle(model={self._config.model!r}, base_url={self._config.base_url!r})"

    def check(self) -> None:
        """Ask for the list of models, which is free. A server without such a list answers 404, and passes."""
        config = self._config
        where = f"oracle.base_url {config.base_url}"
        try:
            with openai.OpenAI(**self._connection(_CHECK_TIMEOUT_S)) as client:
                client.models.with_raw_response.list(extra_headers=self._headers)
        except (openai.AuthenticationError, openai.PermissionDeniedError) as error:
            raise ConfigError(
                f"{where} refuses the key (status {error.status_code}): "
                f"put a valid one where oracle.api_key_env points, which is {config.api_key_env!r}"
            ) from None
        except openai.APIConnectionError as error:
            raise ConfigError(
                f"{where} cannot be reached ({type(error.__cause__).__name__}): start the judge, or correct the address"
            ) from None
        except openai.APIStatusError as error:
            if error.status_code in _OUT_OF_SERVICE:
                raise ConfigError(
                    f"{where} is not in service (status {error.status_code}): "
                    "try again when it is, or correct the address"
                ) from None

    def estimate_usd(self, prompt: str, response: str, second: str | None = None) -> float:
        if second is not None:
            return self._bound_usd(pairwise_prompt(self._rubric, prompt, response, second))
        return self._bound_usd(oracle_prompt(self._rubric, prompt, response))

    async def judge(self, prompt: str, response: str) -> Verdict:
        return await self._ask(oracle_prompt(self._rubric, prompt, response), self._read_score)

    async def compare(self, prompt: str, first: str, second: str) -> Verdict:
        return await self._ask(pairwise_prompt(self._rubric, prompt, first, second), _read_preference)

    async def _ask(self, question: str, read: Callable[[str], _Parsed]) -> Verdict:
        # The price of a call whose outcome is unknown.
        unknown_usd = self._bound_usd(question)
        retrying = tenacity.AsyncRetrying(
            stop=tenacity.stop_after_attempt(self._config.max_retries + 1),
            retry=tenacity.retry_if_exception(may_retry),
            wait=wait_s,
            reraise=True,
        )
        try:
            body: str = await retrying(self._call, question)
        except openai.APIStatusError as error:
            return Verdict(score=None, rationale=self._reason(error.message), billed=False)
        except (TimeoutError, openai.APITimeoutError) as error:
            return _failed(f"no answer within {self._config.timeout_s:g} s", unknown_usd, billed=was_sent(error))
        except openai.APIConnectionError as error:
            reason = self._reason(f"connection failed: {error.__cause__}")
            return _failed(reason, unknown_usd, billed=was_sent(error))
        return self._verdict(body, read, unknown_usd)

    async def _call(self, question: str) -> str:
        """Send one request under the limits, and return the body of the answer as it came."""
        config = self._config
        # About four bytes of text are a token; corrected below, once the server has counted.
        expected_tokens = len(question.encode()) // 4 + config.max_tokens
        await self._requests.acquire()
        await self._tokens.acquire(expected_tokens)
        # OpenAI's own newer models know only the new name, most compatible servers only the old one.
        is_openai = "//api.openai.com" in config.base_url
        # The SDK's own timeout is per read: an answer that comes in drips would pass it.
        async with asyncio.timeout(config.timeout_s):
            raw = await self._client.chat.completions.with_raw_response.create(
                model=config.model,
                messages=[{"role": "user", "content": question}],
                temperature=config.temperature,
                extra_headers=self._headers,
                max_completion_tokens=config.max_tokens if is_openai else openai.Omit(),
                max_tokens=openai.Omit() if is_openai else config.max_tokens,
            )
        body = raw.http_response.text
        if (usage := _usage(body)) is not None:
            self._tokens.correct(usage.prompt_tokens + usage.completion_tokens - expected_tokens)
        return body

    def _verdict(self, body: str, read: Callable[[str], _Parsed], unknown_usd: float) -> Verdict:
        usage = _usage(body)
        # Without a count of the tokens, the price that is safe to assume.
        verdict = Verdict(score=None, rationale="", cost_usd=unknown_usd)
        if usage is not None:
            verdict = replace(
                verdict,
                cost_usd=self._cost_usd(usage.prompt_tokens, usage.completion_tokens),
                input_tokens=usage.prompt_tokens,
                output_tokens=usage.completion_tokens,
            )
        try:
            answer = _Completion.model_validate_json(body).choices[0].message.content or ""
        except ValidationError:
            return replace(verdict, rationale=self._reason(f"not a chat completion: {body}"))
        parsed = read(answer)
        if parsed is None:
            return replace(verdict, rationale=self._reason(f"no clear verdict: {answer}"))
        score, rationale = parsed
        return replace(verdict, score=score, rationale=self._without_key(rationale))

    def _read_score(self, answer: str) -> _Parsed:
        parsed = parse_judgement(answer, self._rubric)
        return None if parsed is None else (float(parsed[0]), parsed[1])

    def _bound_usd(self, question: str) -> float:
        """Bound the price from above: a token is at least one byte of text, an answer has at most `max_tokens`."""
        return self._cost_usd(len(question.encode()) + _CHAT_OVERHEAD_TOKENS, self._config.max_tokens)

    def _cost_usd(self, num_input: int, num_output: int) -> float:
        return 0.0 if self._prices is None else self._prices.cost_usd(num_input, num_output)

    def _connection(self, timeout_s: float) -> _Connection:
        return {
            "base_url": self._config.base_url,
            "api_key": self._key or "none",  # the SDK insists on one, and would take it from the environment
            "max_retries": 0,
            "timeout": openai.Timeout(timeout_s, connect=min(_CONNECT_TIMEOUT_S, timeout_s)),
        }

    def _reason(self, text: str) -> str:
        return self._without_key(text)[:_MAX_REASON]

    def _without_key(self, text: str) -> str:
        """Hide the key in a text of the server's: some quote the request in their errors."""
        return text.replace(self._key, "[api key]") if self._key else text


def _read_preference(answer: str) -> _Parsed:
    parsed = parse_comparison(answer)
    return None if parsed is None else (PREFERENCE_SHARES[parsed[0]], parsed[1])


def _failed(reason: str, unknown_usd: float, *, billed: bool) -> Verdict:
    """Abstain on a call without an answer; if it may have been billed, at the price that is safe to assume."""
    return Verdict(score=None, rationale=reason, billed=billed, cost_usd=unknown_usd if billed else 0.0)


def _require_plain_url(url: str) -> None:
    try:
        parts = urlsplit(url)
        usable = parts.scheme in ("http", "https") and parts.hostname is not None
        secret = parts.username is not None or parts.password is not None
    except ValueError:  # for instance an IPv6 address without its closing bracket
        usable, secret = False, False
    if secret:
        raise ConfigError("oracle.base_url must hold no user name or password (configs are saved); use api_key_env")
    if not usable:
        raise ConfigError(f"oracle.base_url must be an http or https address such as http://host:8000/v1, got {url!r}")


def _usage(body: str) -> _Usage | None:
    """Read how many tokens the server counted; None if it gives no count."""
    try:
        return _Completion.model_validate_json(body).usage
    except ValidationError:
        return None
