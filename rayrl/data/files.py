"""Files of a source: which files a path, pattern or folder stands for, and their bytes and text, decompressed.

This module knows formats by name and by their first bytes; it reads no rows (see `rows`).
"""

import bz2
import codecs
import gzip
import io
import lzma
import os
import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, Literal, NamedTuple, cast
from urllib.parse import urlsplit

import fsspec
import pyarrow as pa
from fsspec.core import url_to_fs

from rayrl.errors import DataError

Format = Literal["json", "csv", "tsv", "parquet", "arrow"]

FORMATS: dict[str, Format] = {
    ".jsonl": "json",
    ".ndjson": "json",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "tsv",
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".feather": "arrow",
}
"""Formats by the suffix of a file, before that of its compression."""
COMPRESSIONS = (".gz", ".zst", ".bz2", ".xz")

_WEB = ("http://", "https://")

_PEEKED_BYTES = 256
_BUFFER_BYTES = 1 << 20
_BINARY: dict[bytes, Format] = {b"PAR1": "parquet", b"ARROW1": "arrow", b"\xff\xff\xff\xff": "arrow"}
"""Formats by the first bytes; the last ones begin a stream of Arrow."""
GIT_LFS = b"version https://git-lfs"
"""Beginning of a pointer that stands in the place of a file which Git LFS has not fetched."""
_UTF_16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
_MARKS = {
    "utf-8": codecs.BOM_UTF8,
    "utf-16-le": codecs.BOM_UTF16_LE,
    "utf-16-be": codecs.BOM_UTF16_BE,
    "utf-32-le": codecs.BOM_UTF32_LE,
    "utf-32-be": codecs.BOM_UTF32_BE,
}
"""Byte order marks that Python reads as text; in the other encodings with marks it leaves them out."""


def find_files(path: str) -> list[str] | None:
    """List the files that a path or a pattern stands for, in order of their names; None for a folder or a hub name.

    Raises:
        DataError: no file matches the pattern, or the path has no known suffix and is neither a folder nor a hub name.
    """
    is_url = "://" in path
    if not is_url and os.path.isdir(path):
        return None
    if not is_url and os.path.isfile(path):
        return [path]
    # An address may hold a question mark that is no pattern.
    if re.search(r"[*\[]" if is_url else r"[*?\[]", path):
        return _matching(path)
    # Web servers have no folders, and a question whether an address is one would fetch the file.
    if suffix_of(path) is not None and (not is_url or path.startswith(_WEB)):
        return [path]
    if is_url:
        with access_to(path):
            filesystem, root = url_to_fs(path)
            return None if filesystem.isdir(root) else [path]
    if is_hub_name(path):
        return None
    raise DataError(f"{path} does not exist; give a file ({_known_suffixes()}), a pattern, a folder or a hub name")


def files_of(path: str, split: str = "train") -> list[str]:
    """List the files that hold the rows of a path, pattern or folder; none for a hub name.

    Raises:
        DataError: see `find_files` and `shards_in`.
    """
    found = find_files(path)
    if found is not None:
        return found
    if is_on_hub(path):
        return []
    if is_saved(path):
        filesystem, root = url_to_fs(path)
        return [filesystem.unstrip_protocol(name) for name in sorted(filesystem.find(root))]
    return shards_in(path, split)


def is_saved(folder: str) -> bool:
    """Return whether `datasets` wrote a folder by save_to_disk."""
    with access_to(folder):
        filesystem, root = url_to_fs(folder)
        return any(filesystem.exists(f"{root.rstrip('/')}/{name}") for name in ("dataset_dict.json", "state.json"))


def is_on_hub(path: str) -> bool:
    """Return whether a path is no folder but a name on the hub."""
    return "://" not in path and is_hub_name(path) and not os.path.isdir(path)


def is_hub_name(path: str) -> bool:
    """Return whether a path looks like a name on the hub: `name`, `user/name`, possibly with `:configuration`."""
    return re.fullmatch(r"[\w.-]+(/[\w.-]+)?(:[\w.-]+)?", path) is not None


def suffix_of(path: str) -> str | None:
    """Return the suffix that names a file's format, in lower case; None without a known one."""
    name = (urlsplit(path).path if path.startswith(_WEB) else path).lower()
    for compression in COMPRESSIONS:
        name = name.removesuffix(compression)
    return next((suffix for suffix in FORMATS if name.endswith(suffix)), None)


def _is_text(path: str) -> bool:
    """Return whether the suffix is that of a format of text."""
    suffix = suffix_of(path)
    return suffix is not None and FORMATS[suffix] in ("json", "csv", "tsv")


def _known_suffixes() -> str:
    return f"{', '.join(FORMATS)}, possibly with {', '.join(COMPRESSIONS)} behind it"


def _matching(pattern: str) -> list[str]:
    is_url = "://" in pattern
    with access_to(pattern):
        filesystem, root = url_to_fs(pattern)
        found = sorted(cast("list[str]", filesystem.glob(root)))
        files = [filesystem.unstrip_protocol(name) if is_url else name for name in found if not filesystem.isdir(name)]
    if not files:
        raise DataError(f"no file matches {pattern}; correct the pattern")
    return files


def shards_in(folder: str, split: str) -> list[str]:
    """List the files of a folder that belong to a split, as `datasets.load_dataset` finds them.

    Raises:
        DataError: the folder holds no file of a known format, files of several formats or of several configurations,
            or not the split.
    """
    from datasets.data_files import EmptyDatasetError, get_data_patterns

    _refuse_configurations(folder)
    try:
        patterns = {str(name): found for name, found in get_data_patterns(folder).items()}
    except (EmptyDatasetError, FileNotFoundError):
        patterns = {}
    by_split = {
        name: sorted({file for pattern in found for file in _matches(pattern, folder) if suffix_of(file)})
        for name, found in patterns.items()
    }
    by_split = {name: files for name, files in by_split.items() if files}
    if not by_split:
        raise DataError(
            f"{folder} holds no file of data and was not written by save_to_disk; give a folder of files "
            f"({_known_suffixes()}), or one file"
        )
    if split not in by_split:
        raise DataError(f"{folder} has no split {split}; the splits there are {', '.join(by_split)}")
    formats = sorted({FORMATS[suffix] for file in by_split[split] if (suffix := suffix_of(file))})
    if len(formats) > 1:
        raise DataError(
            f"{folder} holds files of several formats, {', '.join(formats)}; give a pattern for one of them, such as "
            f"{folder.rstrip('/')}/*.{formats[0]}"
        )
    return by_split[split]


def _matches(pattern: str, folder: str) -> list[str]:
    """List the files of a folder that match one pattern; `datasets` has several patterns for a split."""
    from datasets.data_files import resolve_pattern

    try:
        return resolve_pattern(pattern, folder)
    except FileNotFoundError:
        return []


def _refuse_configurations(folder: str) -> None:
    """Refuse a folder whose card, README.md, names several configurations: their rows belong apart.

    Raises:
        DataError: names them.
    """
    from huggingface_hub import DatasetCard

    # A card that is missing, or cannot be parsed, names nothing: YAML has errors of its own, and the shape is free.
    try:
        with fsspec.open(f"{folder.rstrip('/')}/README.md", "rt", encoding="utf-8") as file:
            card = DatasetCard(cast("io.TextIOBase", file).read()).data.to_dict()
        names = [str(configuration["config_name"]) for configuration in card.get("configs") or []]
    except Exception:
        return
    if len(names) > 1:
        raise DataError(
            f"{folder} holds several configurations of a data set, {', '.join(names)}; give a pattern for the files of "
            f"one of them, such as {folder.rstrip('/')}/{names[0]}/*"
        )


@contextmanager
def access_to(path: str) -> Iterator[None]:
    """Turn what a filesystem raises into a refusal: each has errors of its own, of keys and of networks.

    Raises:
        DataError: names the path and the error.
    """
    try:
        yield
    except DataError:
        raise
    except FileNotFoundError:
        reached = " or cannot be reached" if "://" in path else ""
        raise DataError(f"{path} does not exist{reached}") from None
    except ImportError as error:
        raise DataError(f"{path} needs a package that is not installed: {error}") from None
    except Exception as error:
        raise DataError(
            f"{path} cannot be opened: {type(error).__name__}: {error}; correct the path, or the access to it"
        ) from None


class OpenFile(NamedTuple):
    """An open file, decompressed while it is read."""

    content: io.BufferedReader
    format: Format
    is_compressed: bool


@contextmanager
def open_file(path: str) -> Iterator[OpenFile]:
    """Open a file decompressed, and tell its format: by its first bytes, or else by its suffix.

    Raises:
        DataError: it does not exist or cannot be opened, is a Git LFS pointer, or has no known format.
    """
    with ExitStack() as stack:
        with access_to(path):
            # A text is read from its beginning to its end: one stream, which needs no server that gives parts of files.
            settings: dict[str, Any] = {"block_size": 0} if path.startswith(_WEB) and _is_text(path) else {}
            raw = stack.enter_context(fsspec.open(path, "rb", **settings))
        file = stack.enter_context(io.BufferedReader(raw, _BUFFER_BYTES))  # pyright: ignore[reportArgumentType]
        beginning = file.peek(_PEEKED_BYTES)
        decompressed = _decompressed(file, beginning)
        if decompressed is not None:
            file = stack.enter_context(
                io.BufferedReader(decompressed, _BUFFER_BYTES)  # pyright: ignore[reportArgumentType]
            )
            beginning = file.peek(_PEEKED_BYTES)
        if beginning.startswith(GIT_LFS):
            raise DataError(
                f"{path} is a Git LFS pointer, a note in place of the data; fetch the data with `git lfs pull`"
            )
        yield OpenFile(file, _format_of(path, beginning), is_compressed=decompressed is not None)


def _decompressed(file: io.BufferedReader, beginning: bytes) -> object | None:
    """Return a reader of the decompressed bytes; None if the file is not compressed."""
    if beginning.startswith(b"\x1f\x8b"):
        return gzip.GzipFile(fileobj=file)
    if beginning.startswith(b"BZh"):
        return bz2.BZ2File(file)
    if beginning.startswith(b"\xfd7zXZ\x00"):
        return lzma.LZMAFile(file)
    if beginning.startswith(b"\x28\xb5\x2f\xfd"):
        # Python 3.11 has no Zstandard of its own.
        return pa.CompressedInputStream(pa.PythonFile(file, "r"), "zstd")
    return None


def _format_of(path: str, beginning: bytes) -> Format:
    for magic, name in _BINARY.items():
        if beginning.startswith(magic):
            return name
    suffix = suffix_of(path)
    if suffix is not None:
        return FORMATS[suffix]
    # JSON has many names.
    if beginning.removeprefix(codecs.BOM_UTF8).lstrip().startswith((b"{", b"[")):
        return "json"
    raise DataError(f"{path} must end in one of {_known_suffixes()}, or hold JSON, Parquet or Arrow, or be a folder")


def as_text(file: io.BufferedReader, path: str, encoding: str, *, newline: str) -> io.TextIOWrapper:
    """Read the bytes of an open file as text, without a byte order mark.

    Raises:
        DataError: it begins with the byte order mark of UTF-8 or UTF-16, and another encoding is set.
    """
    name = codecs.lookup(encoding).name
    beginning = file.peek(3)
    # In an encoding of one byte a character, every byte would be read as some text, and a wrong one.
    if beginning.startswith(codecs.BOM_UTF8) and not name.startswith("utf-8"):
        raise DataError(f"{path} begins with the byte order mark of UTF-8; leave out encoding, which is {encoding}")
    if beginning.startswith(_UTF_16) and not name.startswith(("utf-16", "utf-32")):
        raise DataError(f'{path} is UTF-16 and not {encoding}; save it as UTF-8, or set encoding = "utf-16" for it')
    mark = _MARKS.get(name, b"")
    if mark and file.peek(len(mark)).startswith(mark):
        file.read(len(mark))
    return io.TextIOWrapper(file, encoding, newline=newline)


def refused_text(path: str, encoding: str, error: UnicodeError) -> DataError:
    """Make the refusal of a file that is not in its encoding; for UTF-8 it names the line and the byte."""
    where, reason = path, str(error)
    if codecs.lookup(encoding).name in ("utf-8", "utf-8-sig"):
        with open_file(path) as opened:
            found = _first_bad_byte(opened.content)
        if found is not None:
            line, byte = found
            where, reason = f"{path}, line {line}", f"it has the byte 0x{byte:02x}"
    return DataError(
        f"{where} is not in the encoding {encoding}: {reason}; save the file as UTF-8, or set its encoding, such as "
        'encoding = "cp1252" for files of Windows in western Europe'
    )


def _first_bad_byte(file: io.BufferedReader) -> tuple[int, int] | None:
    """Find the first byte that is not UTF-8, and its line; in pieces, since a file may be one line."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    line = 1
    while True:
        piece = file.read(_BUFFER_BYTES)
        try:
            decoder.decode(piece, final=not piece)
        except UnicodeDecodeError as error:
            return line + error.object.count(b"\n", 0, error.start), error.object[error.start]
        if not piece:
            return None
        line += piece.count(b"\n")
