"""Address of a chat endpoint, its key, headers and query; rules that keep secrets out of saved configs."""

import json
import re
from collections.abc import Iterator, Mapping
from urllib.parse import SplitResult, urlsplit

from pydantic import ConfigDict, Field, JsonValue, field_validator, model_validator

from rayrl.config.table import Operation, Table

NO_KEY = "none"
"""Value of `api_key_env` that sends no key, also to a host that would get one by default."""

NOT_SHOWN = "(not shown: it may hold a key)"
"""Stands in messages for a value that is refused."""

_OPENAI_HOST = "api.openai.com"
_SECRET_NAME = re.compile(r"key|token|secret|auth|password|credential|cookie", re.IGNORECASE)
_SECRET_VALUE = re.compile(
    r"\b(?:sk|pk|rk|gsk|xai|hf|ghp)[-_][A-Za-z0-9_-]{6,}|\bAIza[A-Za-z0-9_-]{10,}|^bearer\s", re.I
)
_HEADER_NAME = re.compile(r"[A-Za-z0-9!#$%&'*+.^_`|~-]+")
_OWN_HEADERS = frozenset({"content-length", "content-type", "host", "connection", "transfer-encoding"})
_CHAT_PATH = "/chat/completions"
_OWN_FIELDS = {
    "model": "set oracle.model",
    "messages": "the rubric is the question: set rubric.template",
    "prompt": "the rubric is the question: set rubric.template",
    "temperature": "set oracle.temperature",
    "max_tokens": "set oracle.max_tokens",
    "max_completion_tokens": "set oracle.max_tokens, which is sent under the name that the server wants",
    "response_format": 'set oracle.answer = "json"',
    "n": "set oracle.num_samples",
    "best_of": "set oracle.num_samples",
    "stream": "answers are read in one piece",
    "stream_options": "answers are read in one piece",
    "tools": "an answer is text, and no call of a tool",
    "tool_choice": "an answer is text, and no call of a tool",
    "functions": "an answer is text, and no call of a tool",
    "function_call": "an answer is text, and no call of a tool",
}
"""Fields of a request that `extra_body` may not set, and what to do instead."""


class HttpEndpoint(Table):
    """One address of an OpenAI-compatible server, and what is sent to it beside the question."""

    # An address or a header may hold a secret where none belongs; a refusal must not show it.
    model_config = ConfigDict(hide_input_in_errors=True)

    base_url: Operation[str]
    """Address before "/chat/completions"; most servers want it to end with "/v1"."""
    api_key_env: Operation[str | None] = None
    """Environment variable (or, with a leading "file:", the file) that holds the key; "none" sends no key. Unset,
    OpenAI's own hosts get OPENAI_API_KEY, and any other host gets no key."""
    extra_headers: Operation[dict[str, str]] = Field(default_factory=dict)
    """Headers of a gateway. A secret is written as "env:NAME" or "file:PATH"."""
    extra_query: Operation[dict[str, str]] = Field(default_factory=dict)
    """Query of the address, such as Azure's api-version."""

    @field_validator("base_url")
    @classmethod
    def _plain_url(cls, url: str) -> str:
        _require_plain_url(url)
        return url

    @field_validator("api_key_env")
    @classmethod
    def _place_of_a_key(cls, source: str | None) -> str | None:
        if source is not None and not source.startswith("file:") and _SECRET_VALUE.search(source):
            raise ValueError(
                'api_key_env must be the place of the key, the name of an environment variable or "file:PATH", and '
                "the value given looks like a key itself (not shown; configs are saved)"
            )
        return source

    @field_validator("extra_headers")
    @classmethod
    def _plain_headers(cls, headers: dict[str, str]) -> dict[str, str]:
        for name, value in headers.items():
            _require_plain_header(name, value)
        return headers

    @field_validator("extra_query")
    @classmethod
    def _plain_query(cls, query: dict[str, str]) -> dict[str, str]:
        for name, value in query.items():
            if _SECRET_NAME.search(name) or _SECRET_VALUE.search(value):
                raise ValueError(
                    f"extra_query.{name} looks like a key, and addresses are logged: send it as a header, in "
                    'extra_headers, with a value "env:NAME" or "file:PATH"'
                )
        return query

    @model_validator(mode="after")
    def _one_key(self) -> "HttpEndpoint":
        if self._has_own_authorization and self.api_key_env not in (None, "", NO_KEY):
            raise ValueError("api_key_env and extra_headers.authorization both send a key: leave out one of them")
        return self

    @property
    def is_openai(self) -> bool:
        """Return whether the host is OpenAI's own, the only one that gets OPENAI_API_KEY without being named for it."""
        host = urlsplit(self.base_url).hostname or ""
        return host == _OPENAI_HOST or host.endswith(f".{_OPENAI_HOST}")

    def key_source(self) -> str | None:
        """Return where the API key is, as `rayrl.oracles.keys.read_key` takes it; None sends none."""
        if self.api_key_env in ("", NO_KEY) or self._has_own_authorization:
            return None
        if self.api_key_env is None:
            return "OPENAI_API_KEY" if self.is_openai else None
        return self.api_key_env

    @property
    def _has_own_authorization(self) -> bool:
        return any(name.lower() == "authorization" for name in self.extra_headers)


def looks_like_secret(text: str) -> bool:
    """Return whether a text holds what looks like a key, and should not be shown."""
    return _SECRET_VALUE.search(text) is not None


def require_plain_body(body: Mapping[str, JsonValue]) -> None:
    """Refuse extra fields of a request that have a setting of their own, that look like a secret, or are no JSON.

    Raises:
        ValueError: names the field and the remedy.
    """
    for name in body:
        if name in _OWN_FIELDS:
            raise ValueError(f"extra_body.{name} is not for extra_body: {_OWN_FIELDS[name]}")
    for path, value in _leaves(body):
        name = path.rpartition(".")[2]
        is_secret_name = name.lower().replace("-", "_") in ("api_key", "apikey", "authorization", "secret", "password")
        if is_secret_name or (isinstance(value, str) and _SECRET_VALUE.search(value)):
            raise ValueError(
                f"extra_body.{path} looks like a key, and configs are saved: send it as a header, in extra_headers, "
                'with a value "env:NAME" or "file:PATH"'
            )
    try:
        json.dumps(body, allow_nan=False)
    except ValueError:
        raise ValueError("extra_body must be JSON, which has no nan and no inf; write numbers") from None


def _leaves(value: JsonValue | Mapping[str, JsonValue], path: str = "") -> Iterator[tuple[str, JsonValue]]:
    """Walk nested tables and lists: the dotted path of each value in them."""
    if isinstance(value, Mapping):
        for name, nested in value.items():
            yield from _leaves(nested, f"{path}.{name}" if path else name)
    elif isinstance(value, list):
        for nested in value:
            yield from _leaves(nested, path)
    else:
        yield path, value


def _require_plain_url(url: str) -> None:
    try:
        if any(character.isspace() or not character.isprintable() for character in url):
            raise ValueError("an address has no spaces and line breaks")
        parts = urlsplit(url)
        usable = parts.scheme in ("http", "https") and parts.hostname is not None and parts.port != 0
    except ValueError:  # also an IPv6 address without its closing bracket, or a port that is no number
        parts, usable = SplitResult("", "", "", "", ""), False
    if parts.username is not None or parts.password is not None:
        raise ValueError("base_url must hold no user name or password (configs are saved); use api_key_env")
    if not usable:
        shown = "a value that is not shown, since it may hold a key" if _holds_secret(url) else repr(url)
        raise ValueError(f"base_url must be an http or https address such as http://host:8000/v1, got {shown}")
    if parts.query or parts.fragment or url.endswith(("?", "#")):
        raise ValueError(
            "base_url must end before its query or fragment (not shown, in case it holds a key): put what follows "
            "the ? into extra_query, as in extra_query = { api-version = ... }, and a key where api_key_env points"
        )
    if _SECRET_VALUE.search(parts.path):
        raise ValueError("base_url seems to hold a key in its path (not shown; configs are saved); use api_key_env")
    if parts.path.rstrip("/").endswith(_CHAT_PATH):
        without = url.rstrip("/").removesuffix(_CHAT_PATH)
        raise ValueError(f"base_url must end before {_CHAT_PATH}, which is added to it: use {without}")


def _holds_secret(url: str) -> bool:
    return "@" in url or "?" in url or _SECRET_VALUE.search(url) is not None


def _require_plain_header(name: str, value: str) -> None:
    if _HEADER_NAME.fullmatch(name) is None:
        raise ValueError(f"extra_headers: {name!r} is no name of a header; use letters, digits and -")
    if name.lower() in _OWN_HEADERS:
        raise ValueError(f"extra_headers.{name} is set by the client; leave it out")
    if value.startswith(("env:", "file:")):
        return
    if _SECRET_NAME.search(name) or _SECRET_VALUE.search(value):
        raise ValueError(
            f'extra_headers.{name} must be "env:NAME" or "file:PATH", the place of its value (the value given is '
            "not shown): it looks like a secret, and configs are saved"
        )
    if not value.isascii() or not value.isprintable():
        raise ValueError(f"extra_headers.{name} must be printable ASCII, which a header can hold, got {value!r}")
