"""Modules of the user's: found from the working directory first, and looked at without being imported."""

import ast
import difflib
import importlib
import os
import sys
from collections.abc import Generator, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.machinery import all_suffixes
from pathlib import Path

from rayrl.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class ModuleFile:
    """A module's file."""

    base: str
    """Entry of the import path from which the module is found."""
    file: Path


def find_module(name: str) -> ModuleFile | None:
    """Find a module's file in the working directory, else on the import path; None if it has none, as a built-in."""
    for base in dict.fromkeys([os.getcwd(), *(entry or os.getcwd() for entry in sys.path)]):
        place = Path(base, *name.split("."))
        candidates = [place / "__init__.py", *(place.with_name(place.name + suffix) for suffix in all_suffixes())]
        for file in candidates:
            if file.is_file():
                return ModuleFile(base=base, file=file)
    return None


@contextmanager
def found_first(base: str) -> Generator[None]:
    """Put a folder before all others of the import path, for an import; afterwards it stays as the last one."""
    importlib.invalidate_caches()
    sys.path.insert(0, base)
    try:
        yield
    finally:
        sys.path.remove(base)
        # What the user's functions import when they are called.
        if base not in sys.path:
            sys.path.append(base)


def check_function(path: str, setting: str) -> None:
    """Refuse a "module:function" that is not there, or whose module cannot be read. Imports nothing of the user's.

    Raises:
        ConfigError: no such module, a mistake in its text with file and line, or no such function.
    """
    name, _, function = path.partition(":")
    found = find_module(name)
    if found is None:
        if name.partition(".")[0] not in (*sys.builtin_module_names, *sys.stdlib_module_names):
            raise ConfigError(_explain_missing(name, path, setting))
        return
    if found.file.suffix != ".py":
        return
    try:
        tree = ast.parse(found.file.read_bytes(), filename=str(found.file))
    except (SyntaxError, ValueError) as error:
        raise ConfigError(f"{setting}: {syntax_error(error, found.file)}; mend it") from None
    names = set(_names(tree.body))
    if function not in names and "*" not in names:
        near = difflib.get_close_matches(function, names, n=1)
        remedy = f"did you mean {name}:{near[0]}?" if near else "write it there, or name another"
        raise ConfigError(f'{setting}: {found.file} has no function {function}, got "{path}"; {remedy}')


def syntax_error(error: SyntaxError | ValueError, file: Path) -> str:
    """Say where the text of a module is no Python."""
    if not isinstance(error, SyntaxError):
        return f"{file} is no Python ({error})"
    text = f": {error.text.strip()}" if error.text else ""
    return f"{error.filename or file}, line {error.lineno}: {error.msg}{text}"


def _explain_missing(name: str, path: str, setting: str) -> str:
    """Say which part of a module's dotted name is not there."""
    parts = name.split(".")
    missing = next(number for number in range(1, len(parts) + 1) if not _is_package(parts[:number]))
    if missing == 1:
        what = f"there is no {parts[0]}.py, and no package {parts[0]}"
        remedy = "run from the folder that holds it, correct the name, or install it"
    else:
        what = f"there is no module {parts[missing - 1]} in {'.'.join(parts[: missing - 1])}"
        remedy = "correct the name"
    return f'{setting} must be "module:function", importable from {os.getcwd()}, got "{path}": {what}; {remedy}'


def _is_package(parts: list[str]) -> bool:
    """Return whether the import path has such a folder or module."""
    name = ".".join(parts)
    bases = [os.getcwd(), *(entry or os.getcwd() for entry in sys.path)]
    return find_module(name) is not None or any(Path(base, *parts).is_dir() for base in bases)


def _names(statements: Iterable[ast.stmt]) -> Iterator[str]:
    """List what a module's statements name at its top; "*" where the text does not tell it."""
    for statement in statements:
        match statement:
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name):
                yield "*" if name == "__getattr__" else name
            case ast.Import(names=aliases) | ast.ImportFrom(names=aliases):
                yield from ((alias.asname or alias.name).partition(".")[0] for alias in aliases)
            case ast.If() | ast.Try() | ast.With() | ast.For() | ast.While():
                for block in ("body", "orelse", "finalbody"):
                    yield from _names(getattr(statement, block, []))
                for handler in getattr(statement, "handlers", []):
                    yield from _names(handler.body)
                heads: list[ast.AST] = [*getattr(statement, "items", []), getattr(statement, "target", ast.Pass())]
                for head in heads:
                    yield from _stored(head)
            case _:
                yield from _stored(statement)


def _stored(part: ast.AST) -> Iterator[str]:
    """List the variables that a part of a statement sets; "*" where it may set others by their names."""
    for node in ast.walk(part):
        if isinstance(node, ast.Name) and node.id in ("globals", "setattr"):
            yield "*"
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
