"""API keys and other secrets, read from the environment or a file. No message, log or repr ever shows one."""

import os
import re
import unicodedata
from pathlib import Path

from rayrl.errors import ConfigError

_BYTE_ORDER_MARK = "\ufeff"
_SHORTEST_SECRET = 6
"""A shorter text in a header is no secret, and may well be a score."""


def read_key(source: str | None, setting: str = "oracle.api_key_env") -> str | None:
    """Read the key from the environment variable `source`, or from the file "file:<path>"; None is no key.

    Raises:
        ConfigError: there is no key at that place, no header can hold it, or `source` looks like a key itself.
    """
    if source is None:
        return None
    if source.startswith("file:"):
        return _usable(_file_text(source.removeprefix("file:"), setting), f"the key file {source[5:]}", setting)
    # A name in capitals that is not set is a variable that was forgotten; anything else may be the key itself.
    if source in os.environ or re.fullmatch(r"[A-Z_][A-Z0-9_]*", source):
        return _usable(os.environ.get(source, ""), f"the environment variable {source}", setting)
    raise ConfigError(
        f'{setting} must be the name of an environment variable that is set, "file:" and a path, or "none" for no '
        "key; the value given is none of these (not shown, in case it is a key)"
    )


def read_secret(source: str, setting: str) -> str:
    """Read a secret from "env:NAME", from "file:PATH", or from a place that `read_key` takes.

    Raises:
        ConfigError: as `read_key`.
    """
    secret = read_key(source.removeprefix("env:"), setting)
    assert secret is not None, "None is the only source without a secret"
    return secret


def without_secrets(text: str, secrets: list[str]) -> str:
    """Hide secrets in a text of a server's: some quote the request in their errors."""
    # The longest first: one secret may be the beginning of another.
    for secret in sorted(secrets, key=len, reverse=True):
        if len(secret) >= _SHORTEST_SECRET:
            text = text.replace(secret, "[api key]")
    return text


def _file_text(path: str, setting: str) -> str:
    try:
        return Path(path).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        raise ConfigError(f"{setting}: the key file {path} cannot be read as UTF-8 text; create it") from None


def _usable(text: str, place: str, setting: str) -> str:
    """Cut line breaks and a byte order mark off the ends, which editors add, and refuse what no header can hold."""
    key = text.strip().strip(_BYTE_ORDER_MARK).strip()
    if not key:
        raise ConfigError(
            f"{setting}: {place} is not set or empty; put the judge's key there "
            '(before Ray starts, so that its workers see it), name another place, or write "none" if it needs no key'
        )
    for position, character in enumerate(key, start=1):
        if not " " <= character <= "~":
            name = "a line break" if character in "\r\n" else unicodedata.name(character, f"U+{ord(character):04X}")
            raise ConfigError(
                f"{setting}: {place} holds a character that no HTTP header can hold ({name}, at position {position}; "
                "the key is not shown); write the key again, in plain ASCII and on one line"
            )
    if setting.endswith("api_key_env") and key.lower().startswith("bearer "):
        raise ConfigError(f'{setting}: {place} starts with "Bearer", which is added to the key; write the key alone')
    return key
