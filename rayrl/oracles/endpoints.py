"""One address of a judge: its connections, key and limits; sends questions, and tries again where that may help.

One question is at most one call that may cost money. A call that surely cost nothing (a refused connection, an error
status) is tried again. A call whose outcome is unknown (no answer in time, a connection lost after the question was
sent) is not: it counts as paid.
"""

import asyncio
import itertools
import math
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import httpx

from rayrl.config import FailoverEndpoint, HttpOracleConfig
from rayrl.config.http_endpoint import HttpEndpoint
from rayrl.errors import ConfigError
from rayrl.oracles.completions import Completion, Usage, read_completion
from rayrl.oracles.failures import Failure, LimitField, Reply, Sent, failure_of, words
from rayrl.oracles.keys import read_key, read_secret, without_secrets
from rayrl.oracles.limits import RateLimit
from rayrl.oracles.model_lists import refusal_of_list
from rayrl.oracles.proxies import proxy_of, without_password
from rayrl.oracles.retries import MAX_WAIT_S, backoff_s

_CHECK_TIMEOUT_S = 20.0
_CONNECT_TIMEOUT_S = 10.0
_CALLS_PER_CLIENT = 8
"""Calls at once of one HTTP client. The time in which httpx finds a free connection grows with their number: with 64 it
is longer than all else that a call takes here. So the calls take turns at several clients."""
_NEVER_SENT = (
    httpx.ConnectError,
    httpx.ConnectTimeout,
    httpx.PoolTimeout,
    httpx.ProxyError,
    httpx.UnsupportedProtocol,
    httpx.LocalProtocolError,
)
"""Errors before the question left: the connection was never established."""


class Endpoint:
    """Asks one address. Limits hold for one object, of which a run has one per address."""

    def __init__(self, config: HttpOracleConfig, endpoint: HttpOracleConfig | FailoverEndpoint, prefix: str) -> None:
        self._config = config
        self._prefix = prefix
        self.url = endpoint.base_url
        self._key_source = endpoint.key_source()
        self._headers, self._secrets = _headers(endpoint, prefix)
        self._query = endpoint.extra_query
        self._proxy = proxy_of(self.url)
        self._requests = RateLimit(endpoint.requests_per_minute)
        self._tokens = RateLimit(endpoint.tokens_per_minute)
        # OpenAI's own newer models know only the new name, most compatible servers only the old one.
        self._limit_field: LimitField = "max_completion_tokens" if endpoint.is_openai else "max_tokens"
        timeout = httpx.Timeout(config.timeout_s, connect=min(_CONNECT_TIMEOUT_S, config.timeout_s / 2))
        # Pools without a bound: the caller bounds the calls at once.
        pool = httpx.Limits(max_connections=None, max_keepalive_connections=config.max_concurrency)
        try:
            httpx.URL(self.url)
        except httpx.InvalidURL as error:
            raise ConfigError(f"{self.where} is no usable address ({error}); correct it") from None
        try:
            encryption = httpx.create_ssl_context()
            # Transports of one's own are what keeps the clients from reading proxies out of the environment.
            transports = [
                httpx.AsyncHTTPTransport(proxy=self._proxy, limits=pool, verify=encryption)
                for _ in range(math.ceil(config.max_concurrency / _CALLS_PER_CLIENT))
            ]
        except (ImportError, ValueError, httpx.InvalidURL) as error:
            raise ConfigError(self._unusable_proxy(error)) from None
        self._clients = itertools.cycle(
            [httpx.AsyncClient(transport=each, timeout=timeout, headers=self._headers) for each in transports]
        )

    @property
    def where(self) -> str:
        """Name of the endpoint in messages."""
        return f"{self._prefix}base_url {self.url}"

    async def ask(self, question: str, form: dict[str, Any] | None) -> Completion | Failure:
        """Put a question, and again as long as that may help.

        Args:
            question: the message.
            form: the `response_format` of the answer; None leaves it free.
        """
        num_failed = 0
        refused_limits: set[LimitField] = set()
        while True:
            limit_field = self._limit_field
            outcome = await self._attempt(question, form, limit_field)
            if isinstance(outcome, Completion):
                return outcome
            if outcome.wanted_limit is not None and outcome.wanted_limit not in refused_limits:
                # Free of charge, and learned once for all questions: no retry is used up.
                refused_limits.add(limit_field)
                self._limit_field = outcome.wanted_limit
                continue
            num_failed += 1
            wait_s = backoff_s(num_failed) if outcome.retry_after_s is None else outcome.retry_after_s
            may_pass = outcome.kind in ("passing", "unreachable")
            if not may_pass or num_failed > self._config.max_retries or wait_s > MAX_WAIT_S:
                return self._lasting(outcome)
            await asyncio.sleep(wait_s)

    def check(self) -> str | None:
        """Ask for the list of models, which is free: why judging could not start, and the remedy; None if it can."""
        transport = httpx.HTTPTransport(proxy=self._proxy)
        try:
            with httpx.Client(transport=transport, timeout=_CHECK_TIMEOUT_S, headers=self._headers) as client:
                answer = client.get(f"{self.url.rstrip('/')}/models", params=self._query)
        except httpx.RequestError as error:
            failure = self._unreachable(error)
            return f"{self.where} cannot be reached ({failure.reason}): {failure.remedy}"
        refusal = refusal_of_list(self._reply(answer), self._sent(None, self._limit_field))
        return None if refusal is None else self.without_secrets(f"{self.where} {refusal}")

    def without_secrets(self, text: str) -> str:
        """Hide this endpoint's key and secret headers in a text."""
        return without_secrets(text, self._secrets)

    async def _attempt(
        self, question: str, form: dict[str, Any] | None, limit_field: LimitField
    ) -> Completion | Failure:
        """Send one request under the limits, and read what came back."""
        # About four bytes of text are a token; corrected below, once the server has counted.
        expected_tokens = len(question.encode()) // 4 + self._config.max_tokens
        await self._requests.acquire()
        await self._tokens.acquire(expected_tokens)
        timeout_s = self._config.timeout_s
        try:
            # The client's own timeout is per read: an answer that comes in drips would pass it.
            async with asyncio.timeout(timeout_s):
                answer = await next(self._clients).post(
                    f"{self.url.rstrip('/')}/chat/completions",
                    params=self._query,
                    json=self._payload(question, form, limit_field),
                )
        except _NEVER_SENT as error:
            return self._unreachable(error)
        except (TimeoutError, httpx.TimeoutException):
            return Failure(kind="unknown", reason=f"no answer within oracle.timeout_s = {timeout_s:g} s")
        except httpx.RequestError as error:
            return Failure(kind="unknown", reason=self.without_secrets(f"connection lost: {self._cause(error)}"))
        reply = self._reply(answer)
        failure = failure_of(reply, self._sent(form, limit_field))
        if failure is not None:
            return replace(failure, reason=self.without_secrets(failure.reason))
        completion = read_completion(reply.body)
        if completion is None:
            reason = self.without_secrets(f'not a chat completion: "{words(reply, None)}"')
            return Failure(kind="unknown", reason=reason)
        if completion.usage is not None:
            self._tokens.correct(_total(completion.usage) - expected_tokens)
        return completion

    def _reply(self, answer: httpx.Response) -> Reply:
        # Secrets are hidden before anything is cut: a part of one is no longer found.
        body = self.without_secrets(answer.text)
        return Reply(status=answer.status_code, headers=dict(answer.headers), body=body)

    def _payload(self, question: str, form: dict[str, Any] | None, limit_field: LimitField) -> dict[str, Any]:
        config = self._config
        payload: dict[str, Any] = {"model": config.model, "messages": [{"role": "user", "content": question}]}
        if config.temperature != "default":
            payload["temperature"] = config.temperature
        payload[limit_field] = config.max_tokens
        if form is not None:
            payload["response_format"] = form
        return payload | config.extra_body

    def _sent(self, form: dict[str, Any] | None, limit_field: LimitField) -> Sent:
        return Sent(
            prefix=self._prefix,
            url=self.url,
            model=self._config.model,
            key_source=self._key_source,
            limit_field=limit_field,
            has_temperature=self._config.temperature != "default",
            asks_json=form is not None,
            extra_fields=frozenset(self._config.extra_body),
        )

    def _lasting(self, failure: Failure) -> Failure:
        """A failure that is given up on: an address that was never reached has failed as a judge."""
        if failure.kind != "unreachable":
            return failure
        return replace(failure, kind="judge", reason=f"connection failed ({failure.reason})")

    def _unreachable(self, error: httpx.RequestError) -> Failure:
        remedy = f"start the judge, or correct {self._prefix}base_url"
        if self._proxy is not None:
            remedy += ", or the variables HTTP_PROXY, HTTPS_PROXY, ALL_PROXY and NO_PROXY"
        return Failure(kind="unreachable", reason=self.without_secrets(self._cause(error)), remedy=remedy)

    def _cause(self, error: httpx.RequestError) -> str:
        """Name a failed connection's error, and the proxy that it went through."""
        cause = ": ".join(filter(None, (type(error).__name__, str(error))))
        if self._proxy is None:
            return cause
        return f"{cause}, through the proxy {without_password(self._proxy)} of the environment"

    def _unusable_proxy(self, error: Exception) -> str:
        assert self._proxy is not None, "nothing else can be wrong about a transport"
        proxy = without_password(self._proxy)
        if isinstance(error, ImportError):
            return (
                f"{self.where} would be reached through the proxy {proxy} of the environment, which needs the package "
                "socksio: pip install socksio, or unset ALL_PROXY, or add the judge's host to NO_PROXY"
            )
        return (
            f"{self.where} would be reached through the proxy {proxy} of the environment, which is no usable address: "
            "correct HTTP_PROXY, HTTPS_PROXY or ALL_PROXY, or add the judge's host to NO_PROXY"
        )


def _headers(endpoint: HttpEndpoint, prefix: str) -> tuple[dict[str, str], list[str]]:
    """Write the headers of all requests, and list the secrets in them."""
    headers, secrets = {"User-Agent": "rayrl"}, list[str]()
    for name, value in endpoint.extra_headers.items():
        if value.startswith(("env:", "file:")):
            value = read_secret(value, f"{prefix}extra_headers.{name}")
            # Also without the "Bearer" that the value of a header may start with.
            secrets += [value, value.rpartition(" ")[2]]
        headers[name] = value
    key = read_key(endpoint.key_source(), f"{prefix}api_key_env")
    if key is not None:
        headers["Authorization"] = f"Bearer {key}"
        secrets.append(key)
    return headers, secrets


def _total(usage: Usage) -> int:
    return usage.input_tokens + usage.output_tokens


def failed_everywhere(failures: Iterable[tuple[Endpoint, Failure]]) -> str:
    """Write the message about a judge that failed: what happened at each of its addresses, and the remedy."""
    told: list[str] = []
    for endpoint, failure in failures:
        remedy = f". Remedy: {failure.remedy}" if failure.remedy else ""
        told.append(f"{endpoint.where}: {failure.reason}{remedy}")
    return "; ".join(told)
