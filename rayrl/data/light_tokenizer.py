"""A tokenizer for planning, from tokenizer.json alone: renders and counts without importing transformers.

Training and generation use `tokenizing.load_tokenizer`; for fast tokenizers the counts here agree with it.
"""

import json
import re
from datetime import datetime
from typing import Any

from jinja2 import TemplateError
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer

from rayrl.runs import storage


class LightTokenizer:
    """Renders chats and counts tokens."""

    def __init__(self, tokenizer: Tokenizer, chat_template: str | None, special_tokens: dict[str, str]):
        self._tokenizer = tokenizer
        self._special_tokens = special_tokens
        self.chat_template = chat_template
        self._compiled = _environment().from_string(chat_template) if chat_template else None

    def apply_chat_template(self, conversation: list[dict[str, str]], **options: Any) -> str:
        assert self._compiled is not None  # resolve_format refuses a chat without a template
        return self._compiled.render(messages=conversation, **self._special_tokens, **options)

    def count_tokens(self, rendered: list[str], *, add_special_tokens: bool) -> list[int]:
        """Tokens of each text; special ones are added to plain text only (a template writes its own)."""
        encoded = self._tokenizer.encode_batch_fast(rendered, add_special_tokens=add_special_tokens)
        return [len(encoding.ids) for encoding in encoded]


def load_light_tokenizer(folder: str) -> LightTokenizer | None:
    """The tokenizer of a model folder (a path or URL); None where it has no tokenizer.json."""
    path = storage.join(folder, "tokenizer.json")
    if not storage.exists(path):
        return None
    tokenizer = Tokenizer.from_buffer(storage.read_bytes(path))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    settings = storage.join(folder, "tokenizer_config.json")
    config = storage.read_json(settings) if storage.exists(settings) else {}
    special_tokens = {
        name: token if isinstance(token, str) else token["content"]
        for name in ("bos_token", "eos_token", "pad_token", "unk_token")
        if (token := config.get(name))
    }
    return LightTokenizer(tokenizer, _chat_template(folder, config), special_tokens)


def _chat_template(folder: str, config: dict[str, Any]) -> str | None:
    path = storage.join(folder, "chat_template.jinja")
    if storage.exists(path):
        return storage.read_bytes(path).decode()
    template = config.get("chat_template")
    if isinstance(template, list):  # several named ones
        template = {item["name"]: item["template"] for item in template}.get("default")
    # A mark for training masks: a tag of transformers, and nothing to plain Jinja.
    return re.sub(r"{%-?\s*(end)?generation\s*-?%}", "", template) if template else None


def _environment() -> ImmutableSandboxedEnvironment:
    """The Jinja dialect of chat templates, as transformers documents it."""

    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
    environment.filters["tojson"] = lambda value, **options: json.dumps(
        value, ensure_ascii=False, indent=options.get("indent")
    )
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda pattern: datetime.now().strftime(pattern)
    return environment
