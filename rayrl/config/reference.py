"""Reference of all settings, from the tables themselves: a page for people, and a JSON schema for editors.

    python -m rayrl.config.reference jobs/configs        # writes REFERENCE.md and rayrl.schema.json there

A setting's description is the docstring below its field. `make reference` writes both files; a test keeps them true.
"""

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, cast, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt, MinLen
from pydantic.fields import FieldInfo

from rayrl.config.run import RunConfig
from rayrl.config.table import Growing, Table, is_operation

PAGE, SCHEMA = "REFERENCE.md", "rayrl.schema.json"
HEAD = """\
# Settings

Written by `make reference`, from the tables in rayrl/config. `{schema}` has the same for editors: with a first
line `#:schema {schema}` (and the way to it) they complete a config. "Changes" tells what may be another value at
the next start of a run: *science* is its identity, and another value is another run; *operation* may change, and
repeats nothing; what *may grow* may be raised. What is required must be given, unless its table is left out.
"""
_BOUNDS = {Gt: "> {}", Ge: ">= {}", Lt: "< {}", Le: "<= {}"}
_GROWING = get_args(Growing[int])[1]


class TableEntry(NamedTuple):
    """A table of the config."""

    name: str
    """As in TOML, such as dpo.lora; "" is the top."""
    kind: str
    """Value of its `type`, where several tables may stand in its place; else ""."""
    table: type[Table]


def tables_of(root: type[Table] = RunConfig, name: str = "", kind: str = "") -> Iterator[TableEntry]:
    """Yield a table and all tables inside of it, each before those inside of it."""
    yield TableEntry(name, kind, root)
    for field_name, field in root.model_fields.items():
        inner = list(_tables_in(field.annotation))
        for table in inner:
            below = f"{name}.{field_name}" if name else field_name
            yield from tables_of(table, below, _kind_of(table) if len(inner) > 1 else "")


def _tables_in(annotation: Any) -> Iterator[type[Table]]:
    if isinstance(annotation, type) and issubclass(annotation, Table):
        yield annotation
    for argument in get_args(annotation):
        yield from _tables_in(argument)


def _kind_of(table: type[Table]) -> str:
    kind = table.model_fields.get("type")
    return "" if kind is None else str(kind.default)


def type_in_words(annotation: Any) -> str:
    """Write the type of a setting as a user reads it."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return type_in_words(arguments[0])
    if origin is Literal:
        return " or ".join(json.dumps(value) for value in arguments)
    if origin in (list, tuple):
        inner = [argument for argument in arguments if argument is not ...]
        if origin is tuple and len(inner) > 1:
            return f"[{', '.join(map(type_in_words, inner))}]"
        return f"list of {type_in_words(inner[0])}"
    if origin is dict:
        return f"table of {type_in_words(arguments[1])}"
    if arguments:  # a union
        words = [type_in_words(argument) for argument in arguments if argument is not type(None)]
        return " or ".join(dict.fromkeys(words))
    if isinstance(annotation, type) and issubclass(annotation, Table):
        return "table"
    names: dict[Any, str] = {int: "whole number", float: "number", str: "text", bool: "true or false", Any: "any value"}
    return names.get(annotation) or cast("type[object]", annotation).__name__


def bounds_in_words(field: FieldInfo) -> str:
    """Write the range of a setting; "" without one."""
    bounds: list[str] = []
    for mark in field.metadata:
        for kind, words in _BOUNDS.items():
            if isinstance(mark, kind):
                bounds.append(words.format(getattr(mark, kind.__name__.lower())))
        if isinstance(mark, MinLen):
            bounds.append("not empty" if mark.min_length == 1 else f"at least {mark.min_length}")
    return ", ".join(bounds)


def default_in_words(field: FieldInfo) -> str:
    """Write the default of a setting as TOML, or that there is none."""
    if field.is_required():
        return "required"
    default = field.get_default(call_default_factory=True)
    if default is None:
        return "not set"
    if isinstance(default, Table):
        return "its defaults"
    return f"`{json.dumps(default, default=str)}`"


def changes_in_words(field: FieldInfo) -> str:
    """Say whether a setting may change between two starts."""
    if _GROWING in field.metadata:
        return "may grow"
    return "operation" if is_operation(field) else "science"


def page() -> str:
    """Write the page: a table of the settings for each table of the config."""
    parts = [HEAD.format(schema=SCHEMA)]
    titles: dict[type[Table], str] = {}
    for name, kind, table in tables_of():
        title = f"[{name}]" + (f' type = "{kind}"' if kind else "") if name else "Outside of any table"
        if table in titles:
            parts.append(f"\n## {title}\n\nAs {titles[table]}.\n")
            continue
        titles[table] = title
        parts.append(f"\n## {title}\n\n{_plain(_own_docstring(table))}\n")
        rows = [
            (field_name, field)
            for field_name, field in table.model_fields.items()
            if not any(True for _ in _tables_in(field.annotation)) or field.is_required()
        ]
        if not rows:
            continue
        parts.append("| setting | type | default | changes | |\n|---|---|---|---|---|")
        for field_name, field in rows:
            kind_of = " ".join(filter(None, (type_in_words(field.annotation), bounds_in_words(field))))
            cells = (
                f"`{field_name}`",
                kind_of,
                default_in_words(field),
                changes_in_words(field),
                _plain(field.description or ""),
            )
            parts.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |")
    return "\n".join(parts) + "\n"


def schema() -> str:
    """Write the JSON schema."""
    return json.dumps(RunConfig.model_json_schema(), indent=1, sort_keys=True, default=str) + "\n"


def write(folder: Path) -> None:
    """Write both files into a folder."""
    (folder / PAGE).write_text(page(), encoding="utf-8")
    (folder / SCHEMA).write_text(schema(), encoding="utf-8")


def _own_docstring(table: type[Table]) -> str:
    return table.__dict__.get("__doc__") or ""


def _plain(text: str) -> str:
    """Put a docstring on one line."""
    return re.sub(r"\s+", " ", text).strip()


if __name__ == "__main__":
    write(Path(sys.argv[1]))
