"""Cells of a user's row: text and numbers, checked."""

import math
import re
import unicodedata

from rayrl.errors import DataError

SHOWN_CHARACTERS = 80
"""Of a cell, in messages."""
NULL_WORDS = frozenset({"nan", "none", "null", "n/a", "na", "<na>", "nil", "undefined"})
"""Words, in lower case, that programs write where a cell is empty."""

_NUMBER = re.compile(r"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?", re.ASCII)


def text_cell(cell: object, column: str, where: str) -> str:
    """Read a cell that holds text, or nothing (null, or the number NaN, as which pandas writes an empty cell).

    Raises:
        DataError: it holds something else, or text that is none (see `check_text`).
    """
    if cell is None or (isinstance(cell, float) and math.isnan(cell)):
        return ""
    if not isinstance(cell, str):
        hint = "; a chat belongs into messages_column" if isinstance(cell, list) else "; write it as text"
        raise DataError(f"{where}: column {column} must be text, got {_shown(cell)} ({type(cell).__name__}){hint}")
    check_text(cell, f"column {column}", where)
    return cell


def check_text(text: str, what: str, where: str) -> None:
    """Refuse text that cannot be written as UTF-8, or holds the character NUL.

    Raises:
        DataError: names the row and the place of the character.
    """
    place = text.find("\0")
    if place >= 0:
        raise DataError(f"{where}: {what} holds the character NUL at place {place}; remove it")
    if text.isascii():
        return
    try:
        text.encode()
    except UnicodeEncodeError as error:
        surrogate = ord(text[error.start])
        raise DataError(
            f"{where}: {what} holds half a character, the lone surrogate \\u{surrogate:04x} at place {error.start}; "
            "the text was cut inside a character: remove the half, or write the text again"
        ) from None


def canonical(text: str) -> str:
    """Write a text in the one way of all that differ from it in nothing but white space at the ends of lines and around
    the whole text, Windows' line breaks (CR LF for LF), or the composition of characters (Unicode's normal form C).
    """
    text = text.replace("\r\n", "\n").strip()
    if " \n" in text or "\t\n" in text:
        text = "\n".join(map(str.rstrip, text.split("\n")))
    return text if text.isascii() else unicodedata.normalize("NFC", text)


def number_cell(cell: object, column: str, where: str) -> float | None:
    """Read a cell that holds a number, possibly as text (CSV has only text); None if it is empty or not a number (NaN).

    Raises:
        DataError: it holds something else: other text, true or false, or an infinite number.
    """
    if isinstance(cell, str):
        text = cell.strip()
        if not text or text.lower() in NULL_WORDS:
            return None
        number = float(text) if _NUMBER.fullmatch(text) else None
    elif cell is None:
        return None
    elif isinstance(cell, bool):
        number = None
    else:
        try:
            number = float(cell)  # pyright: ignore[reportArgumentType]
        except (TypeError, ValueError, OverflowError):
            number = None
    if number is None or math.isinf(number):
        raise DataError(f"{where}: column {column} must be a number, got {_shown(cell)}; correct it, or leave it empty")
    return None if math.isnan(number) else number


def _shown(cell: object) -> str:
    return repr(cell)[:SHOWN_CHARACTERS]
