"""A tokenizer for planning, from tokenizer.json alone: renders and counts without importing transformers.

Training and generation use `tokenizing.load_tokenizer`; for fast tokenizers the counts here agree with it.
"""

import json
import re
from datetime import datetime
from typing import TypedDict

from jinja2 import TemplateError
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer

from rayrl.data.chats import Messages
from rayrl.runs import storage

SPECIAL_TOKENS = ("bos_token", "eos_token", "pad_token", "unk_token")
"""Settings that chat templates refer to by name."""


class AddedToken(TypedDict):
    """A special token with its options, of which only the text is read."""

    content: str


class NamedTemplate(TypedDict):
    """One of several chat templates."""

    name: str
    template: str


class TokenizerSettings(TypedDict, total=False):
    """The part of a tokenizer_config.json that is read."""

    bos_token: str | AddedToken | None
    eos_token: str | AddedToken | None
    pad_token: str | AddedToken | None
    unk_token: str | AddedToken | None
    chat_template: str | list[NamedTemplate] | None


class LightTokenizer:
    """Renders chats and counts tokens."""

    def __init__(self, tokenizer: Tokenizer, chat_template: str | None, special_tokens: dict[str, str]):
        self._tokenizer = tokenizer
        self._special_tokens = special_tokens
        self.chat_template = chat_template
        self._compiled = _environment().from_string(chat_template) if chat_template else None

    def apply_chat_template(self, conversation: Messages, **options: object) -> str:
        assert self._compiled is not None  # resolve_format refuses a chat without a template
        return self._compiled.render(messages=conversation, **self._special_tokens, **options)

    def count_tokens(self, rendered: list[str], *, add_special_tokens: bool) -> list[int]:
        """Count the tokens of each text; special tokens go on plain text only, since a template writes its own."""
        encoded = self._tokenizer.encode_batch_fast(rendered, add_special_tokens=add_special_tokens)
        return [len(encoding.ids) for encoding in encoded]


def load_light_tokenizer(folder: str) -> LightTokenizer | None:
    """Load the tokenizer of a model folder (a path or URL); None where it has no tokenizer.json."""
    path = storage.join(folder, "tokenizer.json")
    if not storage.exists(path):
        return None
    tokenizer = Tokenizer.from_buffer(storage.read_bytes(path))
    # A tokenizer.json may carry both, and either would change the counts.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    settings_path = storage.join(folder, "tokenizer_config.json")
    settings: TokenizerSettings = storage.read_json(settings_path) if storage.exists(settings_path) else {}
    special_tokens: dict[str, str] = {}
    for name in SPECIAL_TOKENS:
        token = settings.get(name)
        if token:
            special_tokens[name] = token if isinstance(token, str) else token["content"]
    return LightTokenizer(tokenizer, _chat_template(folder, settings), special_tokens)


def _chat_template(folder: str, settings: TokenizerSettings) -> str | None:
    """Read the chat template: a file of its own goes before the setting, as in transformers."""
    path = storage.join(folder, "chat_template.jinja")
    if storage.exists(path):
        return storage.read_bytes(path).decode()
    template = settings.get("chat_template")
    if isinstance(template, list):
        by_name = {named["name"]: named["template"] for named in template}
        template = by_name.get("default")
    if not template:
        return None
    # A mark for training masks: a tag of transformers that plain Jinja does not know, and that renders nothing.
    return re.sub(r"{%-?\s*(end)?generation\s*-?%}", "", template)


def _environment() -> ImmutableSandboxedEnvironment:
    """Make the Jinja environment of chat templates, as transformers documents it."""

    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    def to_json(value: object, indent: int | None = None, **ignored: object) -> str:
        return json.dumps(value, ensure_ascii=False, indent=indent)

    def strftime_now(pattern: str) -> str:
        return datetime.now().strftime(pattern)

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = strftime_now
    return environment
