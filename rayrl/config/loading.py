"""Loading of a run's config: a TOML file and overrides become a `RunConfig`, or one message about all mistakes."""

import difflib
import tomllib
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from rayrl.config.http_endpoint import NOT_SHOWN, looks_like_secret
from rayrl.config.run import RunConfig
from rayrl.errors import ConfigError

_MAY_HOLD_A_KEY = ("api_key_env", "extra_headers", "extra_query", "extra_body", "base_url")
"""Fields whose values a message does not show, nor what is written in them."""


def load_config(path: str | Path, overrides: list[str] | None = None) -> RunConfig:
    """Read a TOML file, merge dotted `key=value` overrides (values are TOML expressions), and check everything.

    Raises:
        ConfigError: one message that names field, rule, value and remedy for every mistake found.
    """
    path = Path(path)
    if not path.is_file():
        raise ConfigError(f"config file {path} does not exist; jobs/configs/ holds examples")
    try:
        tree = tomllib.loads(path.read_text())
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path} is not valid TOML: {error}") from None
    for override in overrides or []:
        _merge(tree, override)
    try:
        return RunConfig.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(f"{path} is refused:\n" + "\n".join(_explain(error))) from None


def _merge(tree: dict[str, Any], override: str) -> None:
    """Set one dotted key of the tree, and make the sections on the way to it."""
    dotted, equals, expression = override.partition("=")
    if not equals or not dotted:
        raise ConfigError(f"override {_shown(override, [])} must look like section.key=value")
    try:
        value = tomllib.loads(f"value = {expression}")["value"]
    except tomllib.TOMLDecodeError:
        value = expression  # a bare word is a string, so that a shell user need not quote twice
    *sections, key = dotted.split(".")
    table = tree
    for section in sections:
        nested: object = table.setdefault(section, {})
        if not isinstance(nested, dict):
            raise ConfigError(f"override {_shown(override, sections)}: {section} is a value, not a section")
        table = table[section]
    table[key] = value


def _explain(error: ValidationError) -> list[str]:
    """One line per mistake: the field, the rule and the value."""
    lines: list[str] = []
    for mistake in error.errors():
        location = [str(part) for part in mistake["loc"]]
        field = _dotted(location)
        match mistake["type"]:
            case "extra_forbidden":
                near = difflib.get_close_matches(location[-1], _known_keys(location[:-1]), n=1, cutoff=0.5)
                hint = f"; did you mean {near[0]}?" if near else ""
                lines.append(f"  {field}: unknown key{hint}")
            case "union_tag_not_found":
                lines.append(f"  {field}.type: required, and missing; it is one of {_types_of(location)}")
            case "union_tag_invalid":
                got = mistake.get("ctx", {}).get("tag")
                lines.append(f"  {field}.type: must be one of {_types_of(location)}, got {got!r}")
            case "missing":
                lines.append(f"  {field}: required, and missing")
            case "value_error":
                # A rule of ours, whose message is complete.
                lines.append(f"  {field}: {mistake['msg'].removeprefix('Value error, ')}")
            case _:
                rule = mistake["msg"][0].lower() + mistake["msg"][1:]
                lines.append(f"  {field}: {rule}, got {_shown(mistake['input'], location)}")
    return lines


def _shown(value: object, location: list[str]) -> str:
    """Write a refused value, unless it may hold a key: also a table in a wrong place may."""
    text = repr(value)
    is_secret = any(field in location or field in text for field in _MAY_HOLD_A_KEY) or looks_like_secret(text)
    return NOT_SHOWN if is_secret else text


def _types_of(location: list[str]) -> str:
    """List the types of the table at a place of the tree, as the user may write them."""
    models = _models_at(location)
    return ", ".join(f'"{model.model_fields["type"].default}"' for model in models if "type" in model.model_fields)


def _dotted(location: list[str]) -> str:
    """Write a place as the user wrote it: without the types that pydantic puts behind a table, oracle.http.model."""
    field = ""
    for number, part in enumerate(location):
        models = _models_at(location[:number])
        if part.isdigit():
            field += f"[{part}]"
        elif not any("type" in model.model_fields and model.model_fields["type"].default == part for model in models):
            field += f".{part}" if field else part
    return field or "config"


def _known_keys(location: list[str]) -> list[str]:
    """Names allowed at a place of the tree."""
    return [name for model in _models_at(location) for name in model.model_fields]


def _models_at(location: list[str]) -> list[type[BaseModel]]:
    """Find the tables that may stand at a place of the tree; walks them the way pydantic reported the place."""
    models: list[type[BaseModel]] = [RunConfig]
    for part in location:
        nested: list[type[BaseModel]] = []
        for model in models:
            if part in model.model_fields:
                nested += _models_in(model.model_fields[part].annotation)
        # The tag of a discriminated union, or a place in a list, is no field: the models stay.
        models = nested or models
    return models


def _models_in(annotation: object) -> list[type[BaseModel]]:
    """The models that a field may hold: of `A | B | None`, A and B."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    models: list[type[BaseModel]] = []
    for argument in get_args(annotation):
        models += _models_in(argument)
    return models
