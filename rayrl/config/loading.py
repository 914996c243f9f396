"""Loading of configs: a TOML file and overrides become a `RunConfig` or another table, or one message of refusal."""

import datetime
import difflib
import json
import re
import tomllib
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TypeVar, cast, get_args

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from rayrl.config.http_endpoint import NOT_SHOWN, looks_like_secret
from rayrl.config.run import RunConfig
from rayrl.config.table import Table, kinds_of
from rayrl.errors import ConfigError

T = TypeVar("T", bound=Table)
Root = type[BaseModel]
"""The table that a whole file is."""

_MAY_HOLD_A_KEY = ("api_key_env", "extra_headers", "extra_query", "extra_body", "base_url")
"""Fields whose values a message does not show, nor what is written in them."""
_RULES = {
    "greater_than": "must be above {gt}",
    "greater_than_equal": "must be at least {ge}",
    "less_than": "must be below {lt}",
    "less_than_equal": "must be at most {le}",
    "finite_number": "must be a finite number",
    "float_type": "must be a number",
    "float_parsing": "must be a number",
    "int_type": "must be a whole number",
    "int_parsing": "must be a whole number",
    "int_from_float": "must be a whole number",
    "bool_type": "must be true or false",
    "bool_parsing": "must be true or false",
    "string_type": "must be text in quotes",
    "string_too_short": "must not be empty",
    "list_type": "must be a list, in square brackets",
    "tuple_type": "must be a list, in square brackets",
    "too_short": "must have at least {min_length} entries",
    "literal_error": "must be one of {expected}",
}
"""Rules in words, by pydantic's type of a mistake; others are told in pydantic's own words."""
_PYDANTIC_TYPE = re.compile(r"(float|int|str|bool|list\[.*|literal\[.*|dict\[.*|function-.*|constrained-.*)$")
"""What pydantic puts behind a field that takes values of several types."""
_TABLES = ("model_type", "dict_type", "model_attributes_type")
"""Pydantic's types of a mistake where something else stands in the place of a table."""


class _Number(float):
    """A number that remembers how it was written: nan and 1e5 are names where a name is wanted."""

    text: str

    @classmethod
    def read(cls, text: str) -> "_Number":
        number = cls(text)
        number.text = text
        return number


def load_config(
    path: str | Path,
    overrides: list[str] | None = None,
    *,
    pipeline: str | None = None,
    settings: Iterable[tuple[str, object]] = (),
) -> RunConfig:
    """Read a TOML file, merge dotted `key=value` overrides (values are TOML expressions), and check everything.

    Args:
        path: the file, in UTF-8.
        overrides: settings that replace the file's.
        pipeline: the only pipeline that the config may be for; None takes both.
        settings: dotted keys with values, merged last, one after the other; None unsets one. A table is merged into the
            file's, unless it names another `type`.

    Raises:
        ConfigError: one message that names field, rule, value and remedy for every mistake found.
    """
    path = Path(path).expanduser()
    tree = _tree_with(path, overrides)
    for dotted, value in settings:
        merge(tree, dotted, value)
    named = tree.get("pipeline", RunConfig.model_fields["pipeline"].default)
    others = [known for known in get_args(RunConfig.model_fields["pipeline"].annotation) if known != pipeline]
    if pipeline is not None and named in others:
        raise ConfigError(
            f'pipeline must be "{pipeline}" for jobs/{pipeline}.py, got "{named}"; run jobs/{named}.py, '
            "or `rayrl run`, which takes every config"
        )
    return _validated(tree, path, RunConfig)


def load_table(path: str | Path, overrides: list[str] | None, root: type[T]) -> T:
    """Read a TOML file that is another table than a run's config, as `load_config` does."""
    path = Path(path).expanduser()
    return _validated(_tree_with(path, overrides), path, root)


def _tree_with(path: Path, overrides: list[str] | None) -> dict[str, Any]:
    tree = _read_tree(path)
    for override in overrides or []:
        _merge_override(tree, override)
    return tree


def _validated(tree: dict[str, Any], path: Path, root: type[T]) -> T:
    try:
        return root.model_validate(_with_texts(tree, [], root))
    except ValidationError as error:
        raise ConfigError(f"{path} is refused:\n" + "\n".join(_explain(error, root))) from None


def _read_tree(path: Path) -> dict[str, Any]:
    """Read the TOML file.

    Raises:
        ConfigError: no such file, another encoding than UTF-8, or no TOML.
    """
    if path.is_dir():
        raise ConfigError(f"the config must be a TOML file, got the folder {path}; name a file in it")
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise ConfigError(
            f"config file {path} does not exist here ({Path.cwd()}); jobs/configs/ holds examples"
        ) from None
    except OSError as error:
        raise ConfigError(f"config file {path} cannot be read: {error.strerror}; make it readable") from None
    if content.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise ConfigError(
            f"{path} must be in UTF-8, got UTF-16, as Windows' PowerShell writes; save it as UTF-8: "
            f"iconv -f UTF-16 -t UTF-8 {path} > utf8.toml"
        )
    try:
        text = content.decode("utf-8-sig")
        if "\0" in text:
            raise ConfigError(f"{path} must be a TOML file, and holds binary data; name the run's config")
        return tomllib.loads(text, parse_float=_Number.read)
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        if b"\0" in content:
            raise ConfigError(f"{path} must be a TOML file, and holds binary data; name the run's config") from None
        raise ConfigError(
            f"{path} must be in UTF-8, and line {line} has the byte 0x{content[error.start]:02x}, which is not; if it "
            f"is in Latin-1, iconv -f LATIN1 -t UTF-8 {path} > utf8.toml"
        ) from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path} is not valid TOML: {error}; text stands in quotes, tables in [brackets]") from None


def _merge_override(tree: dict[str, Any], override: str) -> None:
    """Set one dotted key of the tree, and make the sections on the way to it."""
    dotted, equals, expression = override.partition("=")
    dotted, expression = dotted.strip(), expression.strip()
    if not equals or not dotted:
        raise ConfigError(
            f"override {_shown(override, [])} must look like section.key=value, in one argument; quote it if it has "
            "spaces: 'select.budget = 64'"
        )
    try:
        parsed = tomllib.loads(f"value = {expression}", parse_float=_Number.read)
    except tomllib.TOMLDecodeError:  # a bare word is a string, so that a shell user need not quote twice
        parsed = {"value": expression}
    if parsed.keys() != {"value"}:
        raise ConfigError(
            f"override {dotted} must be one value, got more settings after a line break "
            f"({', '.join(parsed.keys() - {'value'})}); give each as an argument of its own"
        )
    *sections, key = dotted.split(".")
    _section(tree, sections, override)[key] = parsed["value"]


def merge(tree: dict[str, Any], dotted: str, value: object) -> None:
    """Set one dotted key of a tree of settings; a table is merged into the one that is there, of the same `type`."""
    *sections, key = dotted.split(".")
    table = _section(tree, sections, dotted)
    there: object = table.get(key)
    if isinstance(there, dict) and isinstance(value, dict):
        old, new = cast(dict[str, Any], there), cast(dict[str, object], value)
        if new.get("type", old.get("type")) == old.get("type"):
            for name, nested in new.items():
                merge(old, name, nested)
            return
    table[key] = value


def _section(tree: dict[str, Any], sections: list[str], override: str) -> dict[str, Any]:
    """Find a section of a tree, and make those on the way to it."""
    table = tree
    for section in sections:
        nested: object = table.setdefault(section, {})
        if not isinstance(nested, dict):
            raise ConfigError(
                f"override {_shown(override, sections)}: {section} is a value, not a section; leave out what follows it"
            )
        table = table[section]
    return table


def _with_texts(value: object, location: list[str], root: Root) -> object:
    """Turn the numbers, dates and booleans of a tree to text where a setting is nothing but text, as a name is."""
    if isinstance(value, dict):
        table = cast(dict[str, object], value)
        return {name: _with_texts(nested, [*location, name], root) for name, nested in table.items()}
    if isinstance(value, list):
        entries = enumerate(cast(list[object], value))
        return [_with_texts(nested, [*location, str(place)], root) for place, nested in entries]
    if isinstance(value, str) or value is None or not location:
        return value
    fields = [model.model_fields.get(location[-1]) for model in _models_at(location[:-1], root)]
    kinds = {kind for field in fields if field is not None for kind in kinds_of(field.annotation)}
    if not kinds or not kinds <= {str, type(None)}:
        return float(value) if isinstance(value, _Number) else value
    if isinstance(value, _Number):
        return value.text
    return value.isoformat() if isinstance(value, datetime.date | datetime.time) else json.dumps(value)


def _explain(error: ValidationError, root: Root) -> list[str]:
    """One line per mistake: the field, the rule and the value."""
    lines: list[str] = []
    for mistake in error.errors():
        location = [str(part) for part in mistake["loc"]]
        field = _dotted(location, root)
        what = _explain_one(mistake, location, root)
        # Rules between fields name their fields themselves.
        for name in (field, field.rpartition(".")[2]):
            what = f" {what.removeprefix(f': {name} ')}" if what.startswith(f": {name} ") else what
        line = f"  {field}{what}" if location else f"  {what.removeprefix(': ')}"
        if line not in lines:
            lines.append(line)
    return lines


def _explain_one(mistake: ErrorDetails, location: list[str], root: Root) -> str:
    """Say what is wrong with the field at a place, and what to do; the text goes behind the field."""
    got = _shown(mistake["input"], location)
    match mistake["type"]:
        case "extra_forbidden":
            return f": {_explain_unknown(location, root)}"
        case "union_tag_not_found":
            return f".type: required, and missing; it is one of {_types_of(location, root)}"
        case "union_tag_invalid":
            tag = mistake.get("ctx", {}).get("tag")
            return f".type: must be one of {_types_of(location, root)}, got {tag!r}"
        case "missing":
            return f": required, and missing; {_example_of(location, root)}"
        case "value_error":
            # A rule of ours, whose message is complete.
            return f": {mistake['msg'].removeprefix('Value error, ')}"
        case kind if kind in _TABLES:
            return f": must be a table of settings, got {got}; {_example_of(location, root)}"
        case kind if kind in _RULES:
            return f": {_RULES[kind].format(**_written(mistake.get('ctx', {})))}, got {got}"
        case _:
            return f": {mistake['msg'][0].lower()}{mistake['msg'][1:]}, got {got}"


def _written(limits: dict[str, Any]) -> dict[str, Any]:
    """Write the limits of a rule as a user would: 1 and not 1.0."""
    return {name: f"{limit:g}" if isinstance(limit, float) else limit for name, limit in limits.items()}


def _explain_unknown(location: list[str], root: Root) -> str:
    """Say that a key is unknown, and which one may have been meant, or for which type of the table it is."""
    *table, key = location
    types = _types_at(table[:-1], root)
    owners = [f'"{name}"' for name, model in types.items() if key in model.model_fields]
    if owners and table[-1] in types:
        return (
            f'is a setting of type {" and ".join(owners)}, and this is type "{table[-1]}"; leave it out, or override '
            f"the whole table: '{_dotted(table, root)}={{type = \"{table[-1]}\", ...}}'"
        )
    known = [name for model in _models_at(table, root) for name in model.model_fields]
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    return f"unknown key; did you mean {near[0]}?" if near else "unknown key; leave it out"


def _example_of(location: list[str], root: Root) -> str:
    """Show how a missing setting, or a table in whose place something else stands, may be written."""
    field, models = _dotted(location, root), _models_at(location, root)
    if not models or location[-1].isdigit():
        return f"add {field} = ..."
    name = next(iter(models[0].model_fields))
    default = models[0].model_fields[name].get_default()
    value = json.dumps(default) if isinstance(default, str | int | float) else "..."
    return f"write a table [{field}], or {field}.{name} = {value}"


def _shown(value: object, location: list[str]) -> str:
    """Write a refused value, unless it may hold a key: also a table in a wrong place may."""
    text = repr(value)
    is_secret = any(field in location or field in text for field in _MAY_HOLD_A_KEY) or looks_like_secret(text)
    return NOT_SHOWN if is_secret else text


def _types_of(location: list[str], root: Root) -> str:
    """List the types of the table at a place of the tree, as the user may write them."""
    return ", ".join(f'"{name}"' for name in _types_at(location, root))


def _types_at(location: list[str], root: Root) -> dict[str, type[BaseModel]]:
    """The tables that may stand at a place of the tree, by their type; none where they have no types."""
    models = _models_at(location, root)
    return {model.model_fields["type"].default: model for model in models if "type" in model.model_fields}


def _dotted(location: list[str], root: Root) -> str:
    """Write a place as the user wrote it: without the types that pydantic puts behind a field, oracle.http.model."""
    field = ""
    for number, part in enumerate(location):
        if part.isdigit():
            field += f"[{part}]"
        elif part not in _types_at(location[:number], root) and not _PYDANTIC_TYPE.match(part):
            field += f".{part}" if field else part
    return field


def _models_at(location: list[str], root: Root) -> list[type[BaseModel]]:
    """Find the tables that may stand at a place of the tree; walks them the way pydantic reported the place."""
    models: list[type[BaseModel]] = [root]
    for part in location:
        if part.isdigit():
            continue  # a place in a list
        # The type of a discriminated union is no field: it says which of the tables it is.
        typed = [
            model for model in models if "type" in model.model_fields and model.model_fields["type"].default == part
        ]
        models = typed or [
            nested
            for model in models
            if part in model.model_fields
            for nested in _models_in(model.model_fields[part].annotation)
        ]
    return models


def _models_in(annotation: object) -> list[type[BaseModel]]:
    """The models that a field may hold: of `A | B | None`, A and B."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    models: list[type[BaseModel]] = []
    for argument in get_args(annotation):
        models += _models_in(argument)
    return models
