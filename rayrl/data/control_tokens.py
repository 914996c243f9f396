"""Control tokens inside texts: marked when a prompt is rendered, and encoded as ordinary text.

A tokenizer takes the text of a control token ("</s>", "<|im_end|>") for the token itself, wherever it stands: a user
who writes it would end a turn, and a response that quotes it would teach the policy to stop in the middle. So each
control token inside a text is put between two marks before the chat template adds its own, and what stands between
marks is encoded apart, as ordinary text. A text without control tokens is encoded as if there were no marks.

This module knows no tokenizer library: callers pass functions that encode.
"""

import re
from collections.abc import Callable, Mapping
from typing import Protocol, TypeVar, cast
from weakref import WeakKeyDictionary

from rayrl.errors import DataError

Encode = Callable[[str, bool], list[int]]
"""(text, whether its control tokens are ordinary text) -> token ids, without BOS and EOS."""
T = TypeVar("T")

OPENING, CLOSING = "\ufdd0", "\ufdd1"
"""Marks around a control token inside a text: two of Unicode's noncharacters, which no text for interchange holds."""
ANCHORS = ("\n", "a", ":")
"""Texts to encode a continuation behind; see `encode_behind`."""

_MARKS = re.compile(f"[{OPENING}{CLOSING}]")
_MARKED = re.compile(f"{OPENING}([^{OPENING}{CLOSING}]*){CLOSING}")


class ControlTokens:
    """The control tokens of one tokenizer."""

    def __init__(self, tokens: Mapping[str, int], unknown: str | None = None):
        self._tokens = dict(tokens)
        self.ids = frozenset(tokens.values())
        self.unknown_id = tokens.get(unknown) if unknown is not None else None
        # Any character that the vocabulary lacks becomes the unknown token, which steers nothing.
        self.steering_ids = self.ids - {self.unknown_id}
        # The longest first: of two tokens that begin at the same place, a tokenizer takes the longer.
        longest_first = sorted(filter(None, tokens), key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, longest_first))) if longest_first else None

    def first(self, text: str) -> int | None:
        """Return the id of the control token with which a text begins, or None."""
        match = self._pattern.match(text) if self._pattern is not None else None
        return self._tokens[match[0]] if match else None

    def mark(self, text: str) -> str:
        """Put marks around every control token of a text. Marks that stand in it already are removed first."""
        return self.replace(unmark(text), lambda token: f"{OPENING}{token}{CLOSING}")

    def replace(self, text: str, replacement: Callable[[str], str]) -> str:
        """Replace every control token of a text by what a function makes of it."""
        if self._pattern is None:
            return text
        return self._pattern.sub(lambda token: replacement(token[0]), text)

    def mark_all(self, value: T) -> T:
        """Mark all texts of a nested value, such as a message with its tool calls; keys of dictionaries stay."""
        if isinstance(value, str):
            return cast("T", self.mark(value))
        if isinstance(value, list):
            return cast("T", [self.mark_all(item) for item in cast("list[object]", value)])
        if isinstance(value, dict):
            return cast("T", {key: self.mark_all(item) for key, item in cast("dict[str, object]", value).items()})
        return value


class AddedToken(Protocol):
    """The part of an added token that is read."""

    @property
    def content(self) -> str: ...

    @property
    def special(self) -> bool: ...


class NamesTokens(Protocol):
    """The part of a tokenizer that names its control tokens."""

    @property
    def added_tokens_decoder(self) -> Mapping[int, AddedToken]: ...

    @property
    def all_special_tokens(self) -> list[str]: ...

    @property
    def all_special_ids(self) -> list[int]: ...

    @property
    def special_tokens_map(self) -> Mapping[str, str]: ...


_known: "WeakKeyDictionary[object, ControlTokens]" = WeakKeyDictionary()


def control_tokens(tokenizer: NamesTokens) -> ControlTokens:
    """Return the control tokens of a tokenizer: the special ones of its added tokens, and those with a role.

    They are gathered once per tokenizer, since asking for them takes milliseconds.
    """
    found = _known.get(tokenizer)
    if found is None:
        added = {token.content: token_id for token_id, token in tokenizer.added_tokens_decoder.items() if token.special}
        named = dict(zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True))
        found = _known[tokenizer] = ControlTokens(added | named, unknown=tokenizer.special_tokens_map.get("unk_token"))
    return found


def has_control_tokens(marked: str) -> bool:
    """Return whether a marked text holds a control token."""
    return OPENING in marked


def unmark(text: str) -> str:
    """Remove all marks."""
    return _MARKS.sub("", text) if OPENING in text or CLOSING in text else text


def encode_marked(encode: Encode, control: ControlTokens, marked: str, *, continues: bool = False) -> list[int]:
    """Encode a text in which some control tokens are marked; the others are tokens.

    Args:
        encode: encodes one text.
        control: the tokenizer's control tokens, which no marked text becomes.
        marked: the text.
        continues: the text continues another one, as a response does its prompt.

    Raises:
        DataError: the tokenizer cannot write the text of a marked token in other tokens.
    """
    token_ids: list[int] = []
    # The pattern's group makes every second piece a marked one.
    for number, piece in enumerate(_MARKED.split(marked)):
        is_text = number % 2 == 1
        piece = piece if is_text else unmark(piece)
        if not piece:
            continue
        if is_text:
            token_ids += _spell(encode, control, piece, is_first=not (token_ids or continues))
        elif token_ids or continues:
            token_ids += encode_behind(encode, control, piece)
        else:
            token_ids += encode(piece, False)
    return token_ids


def encode_behind(encode: Encode, control: ControlTokens, text: str, *, is_text: bool = False) -> list[int]:
    """Encode a text that continues another one.

    Sentencepiece-style tokenizers put a space before the first word of the text that they encode. A continuation
    has none: the text is encoded behind an anchor, whose tokens are cut off again. Where an anchor merges
    with the text, the next one is tried.
    """
    for anchor in ANCHORS:
        prefix = encode(anchor, is_text)
        # An unknown token may swallow the ones behind it.
        if control.unknown_id in prefix:
            continue
        anchored = encode(anchor + text, is_text)
        if anchored[: len(prefix)] == prefix:
            return anchored[len(prefix) :]
    return encode(text, is_text)  # the text merges with every anchor


def _spell(encode: Encode, control: ControlTokens, token: str, *, is_first: bool) -> list[int]:
    """Encode the text of a control token in other tokens."""
    token_ids = encode(token, True) if is_first else encode_behind(encode, control, token, is_text=True)
    if control.ids.isdisjoint(token_ids):
        return token_ids
    # A vocabulary may list the control token among its words as well; its characters are other words.
    spelled: list[int] = []
    for number, character in enumerate(token):
        is_start = is_first and number == 0
        spelled += encode(character, True) if is_start else encode_behind(encode, control, character, is_text=True)
    if control.steering_ids.isdisjoint(spelled):
        return spelled
    raise DataError(
        f"the policy's tokenizer cannot read {token!r} inside a text as anything but its control token; remove it from "
        "the texts, or name a policy with another tokenizer"
    )
