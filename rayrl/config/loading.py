"""From a TOML file and overrides to a checked config, or to one message that names every mistake."""

import difflib
import tomllib
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from rayrl.config.run import RunConfig
from rayrl.errors import ConfigError


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
    dotted, equals, expression = override.partition("=")
    if not equals or not dotted:
        raise ConfigError(f"override {override!r} must look like section.key=value")
    try:
        value = tomllib.loads(f"value = {expression}")["value"]
    except tomllib.TOMLDecodeError:
        value = expression  # a bare word is a string, so that a shell user need not quote twice
    *sections, key = dotted.split(".")
    for section in sections:
        tree = tree.setdefault(section, {})
        if not isinstance(tree, dict):
            raise ConfigError(f"override {override!r}: {section} is a value, not a section")
    tree[key] = value


def _explain(error: ValidationError) -> list[str]:
    lines = []
    for item in error.errors():
        location = [str(part) for part in item["loc"]]
        field = ".".join(location) or "config"
        if item["type"] == "extra_forbidden":
            near = difflib.get_close_matches(location[-1], _known_keys(location[:-1]), n=1, cutoff=0.5)
            lines.append(f"  {field}: unknown key" + (f"; did you mean {near[0]}?" if near else ""))
        elif item["type"] == "missing":
            lines.append(f"  {field}: required, and missing")
        elif item["type"] == "value_error":
            lines.append(f"  {field}: {item['msg'].removeprefix('Value error, ')}")
        else:
            rule = item["msg"][0].lower() + item["msg"][1:]
            lines.append(f"  {field}: {rule}, got {item['input']!r}")
    return lines


def _known_keys(location: list[str]) -> list[str]:
    """Names allowed at a place of the tree; walks the models the way pydantic reported the place."""
    models: list[Any] = [RunConfig]
    for part in location:
        nested = [m.model_fields[part].annotation for m in models if part in m.model_fields]
        found = [model for annotation in nested for model in _models_in(annotation)]
        models = found or models  # a discriminator's tag is part of the location but no field
    return [name for model in models for name in model.model_fields]


def _models_in(annotation: Any) -> list[Any]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    arguments = getattr(annotation, "__args__", ())
    return [model for argument in arguments for model in _models_in(argument)]
