"""One address of a judge: its connections, key and limits; sends questions, and tries again where that may help.

One question is at most one call that may cost money. A call that surely cost nothing (a refused connection, an error
status) is tried again. A call whose outcome is unknown (no answer in time, a connection lost after the question was
sent) is not: it counts as paid.
"""

import asyncio
import functools
import json
import os
import ssl
from collections.abc import AsyncGenerator, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import aiohttp
import certifi
from yarl import URL

from rayrl.config import FailoverEndpoint, HttpOracleConfig
from rayrl.config.http_endpoint import HttpEndpoint
from rayrl.errors import ConfigError
from rayrl.oracles.completions import Completion, Usage, read_completion
from rayrl.oracles.failures import Failure, LimitField, Reply, Sent, failure_of, words
from rayrl.oracles.keys import read_key, read_secret, without_secrets
from rayrl.oracles.limits import RateLimit
from rayrl.oracles.model_lists import refusal_of_list
from rayrl.oracles.proxies import (
    SOCKS_PACKAGE,
    is_socks,
    proxy_of,
    require_usable,
    socks_connector,
    socks_errors,
    without_password,
)
from rayrl.oracles.retries import MAX_WAIT_S, backoff_s

_CHECK_TIMEOUT_S = 20.0
_CONNECT_TIMEOUT_S = 10.0
_KEPT_S = 4.0
"""Time for which an idle connection is kept. Many servers close it after 5 s, and a question that is sent into that is
lost, and counts as paid."""
_MAX_HEADER_BYTES = 65536
"""Longest header that is read. Some gateways send more than the 8 kB that aiohttp reads by default."""
_NEVER_SENT = (
    aiohttp.ClientConnectorError,
    aiohttp.ConnectionTimeoutError,
    aiohttp.ClientHttpProxyError,
    aiohttp.InvalidURL,
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
        self._proxy = proxy_of(self.url)
        self._requests = RateLimit(endpoint.requests_per_minute)
        self._tokens = RateLimit(endpoint.tokens_per_minute)
        # OpenAI's own newer models know only the new name, most compatible servers only the old one.
        self._limit_field: LimitField = "max_completion_tokens" if endpoint.is_openai else "max_tokens"
        address = self.url.rstrip("/")
        self._encryption = _encryption()
        try:
            self._chat_url = URL(f"{address}/chat/completions").with_query(endpoint.extra_query)
            self._models_url = URL(f"{address}/models").with_query(endpoint.extra_query)
            # As the lookup of a host's name does, whose error would be no connection's.
            (self._chat_url.raw_host or "").encode("idna")
        except ValueError as error:
            raise ConfigError(f"{self.where} is no usable address ({error}); correct it") from None
        self._never_sent: tuple[type[Exception], ...] = _NEVER_SENT
        if self._proxy is not None:
            try:
                require_usable(self._proxy)
            except (ImportError, ValueError) as error:
                raise ConfigError(self._unusable_proxy(self._proxy, error)) from None
            if is_socks(self._proxy):
                self._never_sent += socks_errors()
        self._sessions: AsyncGenerator[aiohttp.ClientSession] | None = None
        self._session: aiohttp.ClientSession | None = None

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
        # In a thread, since a notebook's own thread has an event loop that runs already.
        with ThreadPoolExecutor(max_workers=1) as thread:
            listed = thread.submit(asyncio.run, self._list_models()).result()
        if isinstance(listed, Failure):
            return f"{self.where} cannot be reached ({listed.reason}): {listed.remedy}"
        refusal = refusal_of_list(listed, self._sent(None, self._limit_field))
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
        # As httpx and OpenAI's own client write it: aiohttp would write all but ASCII in escapes.
        body = json.dumps(self._payload(question, form, limit_field), ensure_ascii=False, separators=(",", ":"))
        try:
            async with asyncio.timeout(timeout_s):
                reply = await self._request("POST", self._chat_url, body.encode())
        except self._never_sent as error:
            return self._unreachable(error)
        except TimeoutError:
            return Failure(kind="unknown", reason=f"no answer within oracle.timeout_s = {timeout_s:g} s")
        except aiohttp.ClientError as error:
            return Failure(kind="unknown", reason=self.without_secrets(f"connection lost: {self._cause(error)}"))
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

    async def _list_models(self) -> Reply | Failure:
        try:
            async with asyncio.timeout(_CHECK_TIMEOUT_S):
                return await self._request("GET", self._models_url)
        except (TimeoutError, aiohttp.ClientError, *self._never_sent) as error:
            return self._unreachable(error)

    async def _request(self, method: str, url: URL, body: bytes | None = None) -> Reply:
        """Send one request, and read its answer to the end, whatever its status."""
        if self._session is None or self._session.closed:
            self._sessions = self._open_session()
            self._session = await anext(self._sessions)
        async with self._session.request(method, url, data=body, allow_redirects=False) as answer:
            text = _decoded(await answer.read(), answer.charset)
        # Secrets are hidden before anything is cut: a part of one is no longer found.
        return Reply(status=answer.status, headers=answer.headers, body=self.without_secrets(text))

    async def _open_session(self) -> AsyncGenerator[aiohttp.ClientSession]:
        """Open a session in the running event loop.

        It is yielded, and not returned, because a loop that ends closes its open generators, and thereby the session.
        """
        # Without a bound: the caller bounds the calls at once.
        options: dict[str, Any] = {"limit": 0, "keepalive_timeout": _KEPT_S, "ssl": self._encryption}
        http_proxy = self._proxy
        if self._proxy is not None and is_socks(self._proxy):
            http_proxy, connector = None, socks_connector(self._proxy, **options)
        else:
            connector = aiohttp.TCPConnector(**options)
        # Only the connection has a timeout here: one per read would let pass an answer that comes in drips.
        connect_s = min(_CONNECT_TIMEOUT_S, self._config.timeout_s / 2)
        async with aiohttp.ClientSession(
            connector=connector,
            proxy=http_proxy,
            headers=self._headers,
            timeout=aiohttp.ClientTimeout(connect=connect_s),
            # A balancer's cookie would send all questions to one server.
            cookie_jar=aiohttp.DummyCookieJar(),
            max_line_size=_MAX_HEADER_BYTES,
            max_field_size=_MAX_HEADER_BYTES,
        ) as session:
            yield session

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

    def _unreachable(self, error: Exception) -> Failure:
        remedy = f"start the judge, or correct {self._prefix}base_url"
        if self._proxy is not None:
            remedy += ", or the variables HTTP_PROXY, HTTPS_PROXY, ALL_PROXY and NO_PROXY"
        return Failure(kind="unreachable", reason=self.without_secrets(self._cause(error)), remedy=remedy)

    def _cause(self, error: Exception) -> str:
        """Name a failed connection's error, and the proxy that it went through."""
        # What such an error writes of itself has the proxy's address with its password.
        told = error.message if isinstance(error, aiohttp.ClientResponseError) else str(error)
        cause = ": ".join(filter(None, (type(error).__name__, told)))
        if self._proxy is None:
            return cause
        return f"{cause}, through the proxy {without_password(self._proxy)} of the environment"

    def _unusable_proxy(self, proxy: str, error: Exception) -> str:
        proxy = without_password(proxy)
        if isinstance(error, ImportError):
            return (
                f"{self.where} would be reached through the proxy {proxy} of the environment, which needs the package "
                f"{SOCKS_PACKAGE}: pip install {SOCKS_PACKAGE}, or unset ALL_PROXY, or add the judge's host to NO_PROXY"
            )
        return (
            f"{self.where} would be reached through the proxy {proxy} of the environment, which is no usable address: "
            "correct HTTP_PROXY, HTTPS_PROXY or ALL_PROXY, or add the judge's host to NO_PROXY"
        )


def _headers(endpoint: HttpEndpoint, prefix: str) -> tuple[dict[str, str], list[str]]:
    """Write the headers of all requests, and list the secrets in them."""
    headers, secrets = {"User-Agent": "rayrl", "Content-Type": "application/json"}, list[str]()
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


@functools.cache
def _encryption() -> ssl.SSLContext:
    """Trust the authorities that SSL_CERT_FILE or SSL_CERT_DIR names, else certifi's: not all images have any."""
    is_named = os.environ.get("SSL_CERT_FILE") or os.environ.get("SSL_CERT_DIR")
    context = ssl.create_default_context(cafile=None if is_named else certifi.where())
    context.set_alpn_protocols(["http/1.1"])
    return context


def _decoded(body: bytes, charset: str | None) -> str:
    """Decode an answer leniently: no byte, and no name of a character set, makes it fail."""
    try:
        return body.decode(charset or "utf-8", "replace")
    except (LookupError, ValueError):
        return body.decode("utf-8", "replace")


def _total(usage: Usage) -> int:
    return usage.input_tokens + usage.output_tokens


def failed_everywhere(failures: Iterable[tuple[Endpoint, Failure]]) -> str:
    """Write the message about a judge that failed: what happened at each of its addresses, and the remedy."""
    told: list[str] = []
    for endpoint, failure in failures:
        remedy = f". Remedy: {failure.remedy}" if failure.remedy else ""
        told.append(f"{endpoint.where}: {failure.reason}{remedy}")
    return "; ".join(told)
