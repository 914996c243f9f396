"""Any OpenAI-compatible chat endpoint as the expert.

One reserved query is at most one call that may cost money. What surely cost nothing (a refused connection,
an error status) is tried again with exponential backoff and jitter. A call whose fate is unknown (no answer
in time, a connection lost after the question was sent) is not: it counts as paid, at its estimated price.
"""

import asyncio
from collections.abc import Callable
from urllib.parse import urlsplit

import openai
import tenacity
from pydantic import BaseModel, Field, ValidationError

from rayrl.config import HttpOracleConfig
from rayrl.errors import ConfigError
from rayrl.models.judge_prompt import Rubric, expert_prompt, parse_judgement
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

_Answer = tuple[float, str] | None
"""Score and rationale, if the answer is clear."""


class _Message(BaseModel):
    content: str | None = None


class _Choice(BaseModel):
    message: _Message


class _Usage(BaseModel):
    prompt_tokens: int = Field(ge=0)
    completion_tokens: int = Field(ge=0)


class _Completion(BaseModel):
    """What is needed of a chat completion; compatible servers differ in the rest."""

    choices: list[_Choice] = Field(min_length=1)
    usage: _Usage | None = None


class HttpOracle:
    """Asks a chat model to judge and to compare. Limits hold for this object: one per run makes them global."""

    def __init__(self, config: HttpOracleConfig, rubric: Rubric) -> None:
        _require_plain_url(config.base_url)
        self._config = config
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
        """Ask for the list of models, which is free; a server that has no such list is there all the same."""
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
        return self._bound_usd(expert_prompt(self._rubric, prompt, response))

    async def judge(self, prompt: str, response: str) -> Verdict:
        return await self._ask(expert_prompt(self._rubric, prompt, response), self._read_score)

    async def compare(self, prompt: str, first: str, second: str) -> Verdict:
        return await self._ask(pairwise_prompt(self._rubric, prompt, first, second), _read_preference)

    async def _ask(self, question: str, read: Callable[[str], _Answer]) -> Verdict:
        unknown_usd = self._bound_usd(question)
        retrying = tenacity.AsyncRetrying(
            stop=tenacity.stop_after_attempt(self._config.max_retries + 1),
            retry=tenacity.retry_if_exception(may_retry),
            wait=wait_s,
            reraise=True,
        )
        try:
            body = await retrying(self._call, question)
        except openai.APIStatusError as error:
            return Verdict(score=None, rationale=self._reason(error.message), billed=False)
        except (TimeoutError, openai.APITimeoutError) as error:
            return _failed(f"no answer within {self._config.timeout_s:g} s", unknown_usd, billed=was_sent(error))
        except openai.APIConnectionError as error:
            reason = self._reason(f"connection failed: {error.__cause__}")
            return _failed(reason, unknown_usd, billed=was_sent(error))
        return self._verdict(body, read, unknown_usd)

    async def _call(self, question: str) -> str:
        """One request under the limits; the body of the answer as it came."""
        config = self._config
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

    def _verdict(self, body: str, read: Callable[[str], _Answer], unknown_usd: float) -> Verdict:
        usage = _usage(body)
        num_input, num_output = (usage.prompt_tokens, usage.completion_tokens) if usage else (0, 0)
        paid = {
            "cost_usd": self._cost_usd(num_input, num_output) if usage else unknown_usd,
            "input_tokens": num_input,
            "output_tokens": num_output,
        }
        try:
            answer = _Completion.model_validate_json(body).choices[0].message.content or ""
        except ValidationError:
            return Verdict(score=None, rationale=self._reason(f"not a chat completion: {body}"), **paid)
        parsed = read(answer)
        if parsed is None:
            return Verdict(score=None, rationale=self._reason(f"no clear verdict: {answer}"), **paid)
        score, rationale = parsed
        return Verdict(score=score, rationale=self._without_key(rationale), **paid)

    def _read_score(self, answer: str) -> _Answer:
        parsed = parse_judgement(answer, self._rubric)
        return parsed and (float(parsed[0]), parsed[1])

    def _bound_usd(self, question: str) -> float:
        """Upper bound: a token is at least one byte of text, and an answer has at most `max_tokens`."""
        return self._cost_usd(len(question.encode()) + _CHAT_OVERHEAD_TOKENS, self._config.max_tokens)

    def _cost_usd(self, num_input: int, num_output: int) -> float:
        input_price, output_price = (
            self._config.usd_per_1m_input or 0.0,
            self._config.usd_per_1m_output or 0.0,
        )
        return (num_input * input_price + num_output * output_price) / 1e6

    def _connection(self, timeout_s: float) -> dict:
        return {
            "base_url": self._config.base_url,
            "api_key": self._key or "none",  # the SDK insists on one, and would take it from the environment
            "max_retries": 0,
            "timeout": openai.Timeout(timeout_s, connect=min(_CONNECT_TIMEOUT_S, timeout_s)),
        }

    def _reason(self, text: str) -> str:
        return self._without_key(text)[:_MAX_REASON]

    def _without_key(self, text: str) -> str:
        """Servers quote requests in their errors, the key included."""
        return text.replace(self._key, "[api key]") if self._key else text


def _read_preference(answer: str) -> _Answer:
    parsed = parse_comparison(answer)
    return parsed and (PREFERENCE_SHARES[parsed[0]], parsed[1])


def _failed(reason: str, unknown_usd: float, *, billed: bool) -> Verdict:
    """A call without an answer; if it may have been billed, at the price that is safe to assume."""
    return Verdict(score=None, rationale=reason, billed=billed, cost_usd=unknown_usd if billed else 0.0)


def _require_plain_url(url: str) -> None:
    try:
        parts = urlsplit(url)
        usable = parts.scheme in ("http", "https") and parts.hostname is not None
        secret = parts.username is not None or parts.password is not None
    except ValueError:
        usable, secret = False, False
    if secret:
        raise ConfigError("oracle.base_url must hold no user name or password (configs are saved); use api_key_env")
    if not usable:
        raise ConfigError(f"oracle.base_url must be an http or https address such as http://host:8000/v1, got {url!r}")


def _usage(body: str) -> _Usage | None:
    try:
        return _Completion.model_validate_json(body).usage
    except ValidationError:
        return None
