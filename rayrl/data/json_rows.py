"""Rows of JSON files: one object per line, one list of objects, objects over several lines, or a list under one key.

The file's beginning shows which one it is, whatever its name. Rows stream: `datasets` and pandas read a list whole, and
name no line.
"""

import io
import itertools
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import cast

from rayrl.data.cells import SHOWN_CHARACTERS
from rayrl.errors import DataError

PEEKED_ROWS = 1000
"""Rows in which every needed column must be once: JSON rows may leave a column out, so one row is not enough."""
MAX_VALUE_CHARACTERS = 1 << 28
"""Longest object that spans lines. It bounds the memory; one that is malformed may seem to go on for ever."""
_CHUNK_CHARACTERS = 1 << 20
_LONGEST_TOKEN = 16
"""Characters that may be missing at the end of a cut value: of a number, a word or an escaped character."""
# Files written one behind the other have byte order marks in the middle.
_BETWEEN_VALUES = re.compile(r"[\s,\ufeff]*")
_NOT_JSON = "the line is not JSON: "
_CUT_IN_A_TEXT = f"{_NOT_JSON}Invalid control character"
"""Beginning of the fault of a line that ends inside a text."""

Content = dict[str, object] | str
"""Cells of a row, or its fault."""


class Ambiguous(dict[str, object]):
    """An object that has keys twice, with the last value of each."""

    twice: frozenset[str]


def _object(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found = dict(pairs)
    if len(found) == len(pairs):
        return found
    ambiguous = Ambiguous(found)
    ambiguous.twice = frozenset(key for key, num in Counter(key for key, _ in pairs).items() if num > 1)
    return ambiguous


_DECODER = json.JSONDecoder(object_pairs_hook=_object)


def json_rows(
    file: io.TextIOWrapper, path: str, needed: Sequence[str] | None, check_columns: Callable[[list[str]], None]
) -> Iterator[tuple[int | None, Content]]:
    """Yield every row with its first line, if that is known: its cells, or its fault.

    Args:
        file: the text, with line breaks at line feeds alone: a JSON text may hold others.
        path: for messages.
        needed: columns, which tell a row from an object that holds the rows; None if any will do.
        check_columns: refuses the columns of the file: those of its first rows, until each needed one was there.

    Raises:
        DataError: the file is no JSON at its beginning, or in the middle of an object that spans lines.
    """
    rows = _rows(file, path, needed)
    first: list[tuple[int | None, Content]] = []
    columns: dict[str, None] = {}
    for each in itertools.islice(rows, PEEKED_ROWS):
        first.append(each)
        if isinstance(each[1], dict):
            columns |= dict.fromkeys(each[1])
        if columns.keys() >= set(needed or ()):
            break
    # Without a readable row, the fault of the first one is the message to give.
    if columns:
        check_columns(list(columns))
    yield from first
    yield from rows


def _rows(file: io.TextIOWrapper, path: str, needed: Sequence[str] | None) -> Iterator[tuple[int | None, Content]]:
    # A list may be one line, as json.dump writes it: no more of it than a chunk is taken at a time.
    number, line = 1, file.readline(_CHUNK_CHARACTERS)
    while line.isspace():
        number += line.count("\n")
        line = file.readline(_CHUNK_CHARACTERS)
    if line.lstrip().startswith("["):
        chunks = iter(lambda: file.read(_CHUNK_CHARACTERS), "")
        for at, value in _values(itertools.chain([line], chunks), path, number):
            yield at, _as_row(value)
        return
    if not line:
        return
    if not line.endswith("\n"):
        line += file.readline()
    lines = ((number, line) for number, line in enumerate(file, number + 1) if not line.isspace())
    content = _parse(line)
    second = next(lines, None)
    if isinstance(content, str) and _may_span_lines(line, content, None if second is None else second[1]):
        text = itertools.chain([line], [] if second is None else [second[1]], file)
        yield from _lone_or_many(_values(text, path, number), path, needed)
        return
    if second is None and isinstance(content, dict):
        yield from _rows_of_object(content, number, path, needed)
        return
    yield number, content
    if second is not None:
        yield second[0], _parse(second[1])
    for number, line in lines:
        yield number, _parse(line)


def _may_span_lines(first: str, fault: str, second: str | None) -> bool:
    """Return whether the first line, which is not JSON, may begin an object that goes on in the second one.

    If not, it is a line that was cut, one fault among rows of a line each.
    """
    if not first.lstrip().startswith("{"):
        return False
    if second is None:
        return True
    if not isinstance(_parse(second), str):
        return False
    # No text goes on over the end of a line, and no object begins inside another one but behind one of these.
    may_go_on = first.rstrip().endswith((":", "[", ",", "}")) and not fault.startswith(_CUT_IN_A_TEXT)
    return may_go_on or not second.lstrip().startswith("{")


def _parse(line: str) -> Content:
    """Parse one line that should hold one object."""
    try:
        return _as_row(_DECODER.decode(line.removeprefix("\ufeff")))
    except (ValueError, RecursionError) as error:  # a number of too many digits is a ValueError too
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)
        return f"{_NOT_JSON}{reason}; got {line.strip()[:SHOWN_CHARACTERS]!r}"


def _as_row(value: object) -> Content:
    if isinstance(value, dict):
        return cast("dict[str, object]", value)
    return f"it must be a JSON object, got {json.dumps(value)[:SHOWN_CHARACTERS]}"


def _values(chunks: Iterator[str], path: str, line: int) -> Iterator[tuple[int, object]]:
    """Yield the values of lists, or values, one behind the other, each with its first line."""
    buffer, start, at_end = "", 0, False

    def read(num_characters: int) -> None:
        nonlocal buffer, start, at_end
        pieces, length = [buffer[start:]], 0
        for chunk in chunks:
            pieces.append(chunk)
            length += len(chunk)
            if length >= num_characters:
                break
        else:
            at_end = True
        buffer, start = "".join(pieces), 0

    def skip() -> None:
        """Skip what stands between values, and count its lines."""
        nonlocal start, line
        while True:
            match = _BETWEEN_VALUES.match(buffer, start)
            assert match is not None  # the pattern matches nothing, too
            line += buffer.count("\n", start, match.end())
            start = match.end()
            if start < len(buffer) or at_end:
                return
            read(_CHUNK_CHARACTERS)

    skip()
    is_list = buffer.startswith("[", start)
    start += is_list
    while True:
        skip()
        if start >= len(buffer):
            if is_list:
                raise DataError(f"{path}, line {line}: the file is not JSON: its list is not closed; write it again")
            return
        if is_list and buffer[start] == "]":
            start += 1
            skip()
            if start >= len(buffer):
                return
            # Files written one behind the other are several lists.
            if buffer[start] != "[":
                raise DataError(f"{path}, line {line}: text follows the end of the list; remove it, or write one list")
            start += 1
            continue
        try:
            value, end = _DECODER.raw_decode(buffer, start)
        except json.JSONDecodeError as error:
            # At the end of what is read, the value may go on behind it.
            is_cut = error.msg.startswith("Unterminated string") or error.pos >= len(buffer) - _LONGEST_TOKEN
            if is_cut and not at_end and len(buffer) - start > MAX_VALUE_CHARACTERS:
                raise DataError(
                    f"{path}, line {line}: the value that begins here is longer than {MAX_VALUE_CHARACTERS:,} "
                    "characters, or never closes; write each row as one object on a line of its own"
                ) from None
            if at_end or not is_cut:
                at = line + buffer.count("\n", start, error.pos)
                raise DataError(
                    f"{path}, line {at} is not JSON: {error.msg}; the value begins at line {line}. Correct it, or "
                    "write each row as one object on a line of its own"
                ) from None
            # Twice as much each time: a long value is parsed anew only a few times.
            read(max(_CHUNK_CHARACTERS, len(buffer) - start))
            continue
        except (ValueError, RecursionError) as error:  # too many digits, or too many levels
            raise DataError(f"{path}, line {line}: the value that begins here cannot be read: {error}") from None
        # A number may go on behind what is read.
        if end == len(buffer) and not at_end:
            read(_CHUNK_CHARACTERS)
            continue
        yield line, value
        line += buffer.count("\n", start, end)
        start = end


def _lone_or_many(
    values: Iterator[tuple[int, object]], path: str, needed: Sequence[str] | None
) -> Iterator[tuple[int | None, Content]]:
    line, first = next(values, (0, None))
    second = next(values, None)
    if second is None and isinstance(first, dict):
        yield from _rows_of_object(cast("dict[str, object]", first), line, path, needed)
        return
    yield line, _as_row(first)
    if second is not None:
        yield second[0], _as_row(second[1])
    for line, value in values:
        yield line, _as_row(value)


def _rows_of_object(
    document: dict[str, object], line: int, path: str, needed: Sequence[str] | None
) -> Iterator[tuple[int | None, Content]]:
    """Yield the rows of a file that is one object: itself, or those of the one list that it holds, without lines."""
    if _is_by_columns(document, needed):
        raise DataError(
            f"{path} is one object of columns, and not of rows; write its rows, with pandas by "
            'to_json(path, orient="records", lines=True)'
        )
    lists = {
        key: cast("list[object]", value)
        for key, value in document.items()
        if isinstance(value, list) and value and all(isinstance(each, dict) for each in cast("list[object]", value))
    }
    # A row may hold lists of objects too, such as its messages: those of rows have a needed column.
    items = itertools.chain.from_iterable(lists.values())
    is_row = needed is not None and (
        any(name in document for name in needed)
        or not any(name in cast("dict[str, object]", item) for item in items for name in needed)
    )
    if is_row or not lists:
        yield line, document
        return
    if len(lists) > 1:
        raise DataError(
            f"{path} is one object with several lists, under {', '.join(lists)}; write the one with the rows into a "
            "file of its own"
        )
    (rows,) = lists.values()
    for row in rows:
        yield None, _as_row(row)


def _is_by_columns(document: dict[str, object], needed: Sequence[str] | None) -> bool:
    """Return whether an object is a table by columns: {"prompt": {"0": ..., "1": ...}}, or with lists of texts."""
    columns = [document[name] for name in document if needed is None or name in needed]
    if not columns:
        return False
    if all(isinstance(column, dict) and column for column in columns):
        return all(key.isdigit() for column in columns for key in cast("dict[str, object]", column))
    return all(
        isinstance(column, list)
        and len(column) > 1
        and all(isinstance(cell, str) for cell in cast("list[object]", column))
        for column in columns
    )
