"""Text of a judge's answer, without what is no part of the answer: thoughts, and tokens of the chat format.

Reasoning models think in a block of their own, in which they may consider any score. Servers should keep it apart, and
many leave it in the text.
"""

import re

_NAMES = "think|thinking|thought|thoughts|reasoning|reflection|analysis"
# A tag in quotes or backticks is spoken about. A closing tag has the same name and brackets as its opening one.
_THOUGHT_TAG = re.compile(
    rf"""(?<![`'"])(?:
        <(?P<a>/?)(?P<angle>(?:\w+:)?(?:{_NAMES}))>
      | \[(?P<b>/?)(?P<square>{_NAMES})\]
      | \u25c1(?P<c>/?)(?P<triangle>{_NAMES})\u25b7
      | <\|(?P<d>START|END)_(?P<bar>THINKING)\|>
      | <\|channel\|>(?P<channel>analysis|commentary|final)(?:<\|message\|>)?
      | (?P<end><\|end\|>)
    )(?![`'"])""",
    re.IGNORECASE | re.VERBOSE,
)
_CHANNEL = "channel"
"""Kind of a thought of the harmony format: its end is the token <|end|>, or the channel of the answer."""
# Tokens that end a message or a text in common chat formats, and the closing fence of a block of code.
_END = re.compile(r"(?:</s>|<eos>|<end_of_turn>|<\|[\w\u2581]{2,30}\|>|(?<=\n)```)\Z", re.IGNORECASE)
_MAX_END = 40
"""Longest of these, in characters: a search from the start of a long text would be slow."""
_FULL_WIDTH = {place: place - 0xFEE0 for place in range(0xFF01, 0xFF5F)}
"""Full-width forms of ASCII, which answers in Chinese and Japanese use. Not superscripts: 4\u00b2 is not 42."""


def without_thoughts(text: str) -> str | None:
    """Cut thoughts out of an answer; None if one is not closed: then no answer was given.

    A closing tag without an opening one ends a thought that the server opened in the prompt: what is before it is cut.
    """
    pieces: list[str] = []
    thought: str | None = None  # kind of the thought that is open
    start = 0
    for tag in _THOUGHT_TAG.finditer(text):
        kind, opens = _kind(tag)
        if thought is None and opens:
            pieces.append(text[start : tag.start()])
            thought = kind
        elif thought is None:
            # The end of a message is no thought's end, where no thought was begun.
            if tag["end"] is None:
                pieces.clear()
                start = tag.end()
        elif kind == thought and not opens:
            thought, start = None, tag.end()
    if thought is not None:
        return None
    return "\n".join([*pieces, text[start:]]).strip()


def without_end(text: str) -> str:
    """Cut tokens of a chat format and closing code fences off the end of an answer."""
    while True:
        text = text.rstrip()
        end = _END.search(plain_ascii(text[-_MAX_END:]))
        if end is None:
            return text
        text = text[: -len(end[0])]


def plain_ascii(line: str) -> str:
    """Write full-width letters, digits and signs as ASCII."""
    return line.translate(_FULL_WIDTH)


def _kind(tag: re.Match[str]) -> tuple[str, bool]:
    """Return which kind of thought a tag belongs to, and whether it opens one."""
    if tag["end"] is not None:
        return _CHANNEL, False
    if tag["channel"] is not None:
        return _CHANNEL, tag["channel"].lower() != "final"
    for brackets, slash in (("angle", "a"), ("square", "b"), ("triangle", "c"), ("bar", "d")):
        if tag[brackets] is not None:
            return f"{brackets} {tag[brackets].lower()}", tag[slash].upper() in ("", "START")
    raise AssertionError("a tag is one of the kinds")
