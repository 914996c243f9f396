"""API keys, read from the environment or a file. No message, log or repr ever shows one."""

import os
import re
from pathlib import Path

from rayrl.errors import ConfigError


def read_key(source: str | None) -> str | None:
    """Read the key from the environment variable `source`, or from the file "file:<path>"; None is no key.

    Raises:
        ConfigError: there is no key at that place, or `source` looks like a key itself.
    """
    if source is None:
        return None
    if source.startswith("file:"):
        path = Path(source.removeprefix("file:"))
        try:
            key = path.read_text().strip()
        except (OSError, UnicodeDecodeError):
            raise ConfigError(f"oracle.api_key_env: the key file {path} cannot be read; create it") from None
        place = f"the key file {path}"
    # A name in capitals that is not set is a variable that was forgotten; anything else may be the key itself.
    elif source in os.environ or re.fullmatch(r"[A-Z_][A-Z0-9_]*", source):
        key, place = os.environ.get(source, "").strip(), f"the environment variable {source}"
    else:
        raise ConfigError(
            'oracle.api_key_env must be the name of an environment variable that is set, or "file:" and a '
            "path; the value given is neither (not shown, in case it is a key)"
        )
    if not key:
        raise ConfigError(
            f"oracle.api_key_env: {place} is not set or empty; put the judge's key there "
            "(before Ray starts, so that its workers see it), or name another place"
        )
    return key
