"""A tokenizer for planning, from tokenizer.json alone: renders and counts without importing transformers.

Training and generation use `tokenizing.load_tokenizer`; for fast tokenizers the counts here agree with it.
"""

import json
import re
from collections.abc import Mapping
from datetime import datetime
from functools import cached_property
from typing import TypedDict, cast

from jinja2 import Template, TemplateError
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import AddedToken, Tokenizer

from rayrl.data.chats import Messages
from rayrl.data.control_tokens import control_tokens, encode_marked, has_control_tokens, unmark
from rayrl.errors import ConfigError
from rayrl.runs import storage

SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
"""Settings that chat templates refer to by name."""
GENERIC_CLASSES = ("PreTrainedTokenizerFast", "TokenizersBackend")
"""Tokenizer classes without special tokens of their own: these have the ones that the settings name."""


class TokenOptions(TypedDict):
    """A special token with its options, of which only the text is read."""

    content: str


class NamedTemplate(TypedDict):
    """One of several chat templates."""

    name: str
    template: str


class TokenizerSettings(TypedDict, total=False):
    """The part of a tokenizer_config.json that is read."""

    bos_token: str | TokenOptions | None
    eos_token: str | TokenOptions | None
    unk_token: str | TokenOptions | None
    sep_token: str | TokenOptions | None
    pad_token: str | TokenOptions | None
    cls_token: str | TokenOptions | None
    mask_token: str | TokenOptions | None
    tokenizer_class: str
    added_tokens_decoder: dict[str, object]
    chat_template: str | dict[str, str] | list[NamedTemplate] | None


class LightTokenizer:
    """Renders chats and counts tokens."""

    def __init__(
        self, tokenizer: Tokenizer, chat_template: str | dict[str, str] | None, special_tokens: dict[str, str]
    ):
        """Take over a tokenizer, to which the special tokens are added.

        Args:
            tokenizer: encodes.
            chat_template: a template, or several by name.
            special_tokens: texts by their names in `SPECIAL_TOKENS`.
        """
        self._tokenizer = tokenizer
        self._special_tokens = special_tokens
        self.chat_template = chat_template
        added = [AddedToken(token, normalized=False, special=True) for token in special_tokens.values()]
        tokenizer.add_special_tokens(added)

    @property
    def added_tokens_decoder(self) -> Mapping[int, AddedToken]:
        """Added tokens by id."""
        return self._tokenizer.get_added_tokens_decoder()

    @property
    def all_special_tokens(self) -> list[str]:
        """Texts of the tokens that have a role, without repeats."""
        return list(dict.fromkeys(self._special_tokens.values()))

    @property
    def all_special_ids(self) -> list[int]:
        """Ids of `all_special_tokens`."""
        return [cast("int", self._tokenizer.token_to_id(token)) for token in self.all_special_tokens]

    @property
    def special_tokens_map(self) -> Mapping[str, str]:
        """Texts by their names in `SPECIAL_TOKENS`."""
        return self._special_tokens

    @cached_property
    def _compiled(self) -> Template:
        # Only once a chat is rendered: a policy that reads plain text may have a broken template.
        template = self.chat_template
        text = template["default"] if isinstance(template, dict) else template
        assert text is not None  # resolve_format refuses a chat without a template
        return _environment().from_string(text)

    def apply_chat_template(self, conversation: Messages, **options: object) -> str:
        # Transformers gives every template these two, so that one may test them for none.
        return self._compiled.render(
            messages=conversation, tools=None, documents=None, **{**self._special_tokens, **options}
        )

    def count_tokens(self, rendered: list[str], *, add_special_tokens: bool) -> list[int]:
        """Count the tokens of each text, of which marked control tokens are ordinary text.

        Args:
            rendered: texts as `rayrl.data.tokenizing.render` makes them.
            add_special_tokens: the texts are plain and not rendered by a chat template, which writes its own special
                tokens: all their control tokens are ordinary text, and a BOS goes first if the tokenizer adds one.
        """
        control = control_tokens(self)
        marked = control.mark_all(rendered) if add_special_tokens else rendered
        encodings = self._tokenizer.encode_batch_fast([unmark(text) for text in marked], add_special_tokens=False)
        counts = [len(encoding.ids) for encoding in encodings]
        for number, text in enumerate(marked):
            if has_control_tokens(text):
                counts[number] = len(encode_marked(self._encode, control, text))
        num_added = int(add_special_tokens and self._adds_bos())
        return [count + num_added for count in counts]

    def _encode(self, text: str, is_text: bool) -> list[int]:
        self._tokenizer.encode_special_tokens = is_text
        token_ids = self._tokenizer.encode(text, add_special_tokens=False).ids
        self._tokenizer.encode_special_tokens = False
        return token_ids

    def _adds_bos(self) -> bool:
        bos = self._special_tokens.get("bos_token")
        return bos is not None and self._tokenizer.encode("a").tokens[:1] == [bos]


def load_light_tokenizer(folder: str) -> LightTokenizer | None:
    """Load the tokenizer of a model folder (a path or URL); None where it has no tokenizer.json.

    Raises:
        ConfigError: it names no end-of-sequence token.
    """
    path = storage.join(folder, "tokenizer.json")
    if not storage.exists(path):
        return None
    tokenizer = Tokenizer.from_buffer(storage.read_bytes(path))
    # A tokenizer.json may carry both, and either would change the counts.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    settings = _settings(folder)
    special_tokens: dict[str, str] = {}
    for name in SPECIAL_TOKENS:
        token = settings.get(name)
        if token:
            special_tokens[name] = token if isinstance(token, str) else cast("TokenOptions", token)["content"]
    if "eos_token" not in special_tokens and settings.get("tokenizer_class") in GENERIC_CLASSES:
        raise ConfigError(
            f"policy.path must name a tokenizer with an end-of-sequence token, got {folder}; "
            "set eos_token in its tokenizer_config.json"
        )
    return LightTokenizer(tokenizer, _chat_template(folder, settings), special_tokens)


def _settings(folder: str) -> TokenizerSettings:
    """Read the tokenizer's settings: those of special_tokens_map.json go first, where transformers reads it at all."""
    path = storage.join(folder, "tokenizer_config.json")
    settings: TokenizerSettings = storage.read_json(path) if storage.exists(path) else {}
    path = storage.join(folder, "special_tokens_map.json")
    if "added_tokens_decoder" not in settings and storage.exists(path):
        settings = cast("TokenizerSettings", {**settings, **storage.read_json(path)})
    return settings


def _chat_template(folder: str, settings: TokenizerSettings) -> str | dict[str, str] | None:
    """Read the chat template: a file of its own goes before the setting, as in transformers."""
    path = storage.join(folder, "chat_template.jinja")
    if storage.exists(path):
        return _without_training_marks(storage.read_bytes(path).decode())
    template = settings.get("chat_template")
    if isinstance(template, dict):
        return {name: _without_training_marks(text) for name, text in template.items()}
    if isinstance(template, list):
        return {named["name"]: _without_training_marks(named["template"]) for named in template}
    return _without_training_marks(template) if template else None


def _without_training_marks(template: str) -> str:
    """Remove the marks for training masks: a tag of transformers that plain Jinja does not know; it renders nothing."""
    return re.sub(r"{%-?\s*(end)?generation\s*-?%}", "", template)


def _environment() -> ImmutableSandboxedEnvironment:
    """Make the Jinja environment of chat templates, as transformers documents it."""

    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    def to_json(
        value: object,
        ensure_ascii: bool = False,
        indent: int | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    def strftime_now(pattern: str) -> str:
        return datetime.now().strftime(pattern)

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = strftime_now
    return environment
