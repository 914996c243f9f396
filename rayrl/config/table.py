"""Base of every TOML table; the marks that tell a run's operation from its science; settings that name an entry.

A run's science (data, models, seeds, losses, selection, rubric, judge) is its identity. Its operation (limits, prices,
places, workers) is how it is carried out, and may change between two starts. A field says which it is: its type is
`Operation[...]`, or it is science.
"""

import json
import math
import os
import re
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal, TypeVar, cast, get_args, get_origin

from pydantic import AfterValidator, BaseModel, ConfigDict, model_validator
from pydantic.fields import FieldInfo

T = TypeVar("T")

_OPERATION, _GROWING = "operation", "growing"

Operation = Annotated[T, _OPERATION]
"""Type of a setting that may change between two starts of a run: it is in no key, and repeats no work."""
Growing = Annotated[T, _GROWING]
"""Type of a number that may be raised between two starts. It is in the keys: what it decides is done again."""


Place = Annotated[str, AfterValidator(os.path.expanduser)]
"""A path, a URL or a hub name; a leading ~ is the home directory."""


def plain_name(name: str, example: str) -> str:
    """Return a name that is fit for reports, trackers and folders; refuse any other, and propose one, or `example`."""
    if not re.fullmatch(r"[\w.-]+", name):
        plain = re.sub(r"[^\w.-]+", "-", name).strip("-") or example
        raise ValueError(f'must be letters, digits, ".", "_" and "-", got {name!r}; write "{plain}"')
    return name


class Table(BaseModel):
    """Base of every TOML table: frozen; an unknown key is an error, and every number is finite and no boolean."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", protected_namespaces=(), allow_inf_nan=False, use_attribute_docstrings=True
    )

    @model_validator(mode="before")
    @classmethod
    def _plain_numbers(cls, values: object) -> object:
        """Refuse booleans in the place of numbers, which pydantic would take for 0 and 1, and what is not finite."""
        if not isinstance(values, dict):
            return values
        plain: dict[object, object] = {}
        for name, value in cast(dict[object, object], values).items():
            field = cls.model_fields.get(str(name))
            kinds: set[object] = set() if field is None else set(kinds_of(field.annotation))
            if Any in kinds and any(isinstance(each, float) and not math.isfinite(each) for each in _leaves(value)):
                raise ValueError(f"{name} must hold finite numbers only, got nan or inf; write numbers")
            takes_numbers = bool(kinds & {int, float}) and not kinds & {bool, Any}
            plain[name] = _without_booleans(value) if takes_numbers else value
        return plain

    def science(self) -> dict[str, Any]:
        """Return the settings that decide the outcome, nested tables included, as JSON's values."""
        tree = self.model_dump(mode="json")
        for name, field in type(self).model_fields.items():
            value = getattr(self, name)
            if is_operation(field):
                del tree[name]
            elif isinstance(value, Table):
                tree[name] = value.science()
            elif tables := _tables_in(value):
                tree[name] = [table.science() for table in tables]
            elif isinstance(value, dict):
                # The order of a dictionary's keys is no setting.
                tree[name] = json.loads(json.dumps(tree[name], sort_keys=True))
        return tree

    def science_json(self, exclude: frozenset[str] = frozenset()) -> str:
        """Write the science as text, for a key, without the fields to exclude."""
        return json.dumps({name: value for name, value in self.science().items() if name not in exclude})

    def operation(self, prefix: str = "") -> dict[str, Any]:
        """Return the settings that may change between two starts, by their dotted names, as JSON's values."""
        tree = self.model_dump(mode="json")
        settings: dict[str, Any] = {}
        for name, field in type(self).model_fields.items():
            value = getattr(self, name)
            if is_operation(field):
                settings[prefix + name] = tree[name]
            elif isinstance(value, Table):
                settings |= value.operation(f"{prefix}{name}.")
            for place, table in enumerate(_tables_in(value)):
                settings |= {} if is_operation(field) else table.operation(f"{prefix}{name}[{place}].")
        return settings

    def growing(self, prefix: str = "") -> dict[str, float]:
        """Return the numbers that may be raised between two starts, by their dotted names."""
        numbers: dict[str, float] = {}
        for name, field in type(self).model_fields.items():
            value = getattr(self, name)
            if _GROWING in field.metadata:
                numbers[prefix + name] = value
            elif isinstance(value, Table):
                numbers |= value.growing(f"{prefix}{name}.")
        return numbers


def _tables_in(value: object) -> list[Table]:
    """Return a list's tables; none of any other value."""
    return [each for each in cast(list[object], value) if isinstance(each, Table)] if isinstance(value, list) else []


class _Word(str):
    """A word that no number can be read from, shown without quotes."""

    def __repr__(self) -> str:
        return str(self)


def _without_booleans(value: object) -> object:
    """Replace booleans, also in a list, by words."""
    if isinstance(value, bool):
        return _Word(json.dumps(value))
    return list(map(_without_booleans, cast(list[object], value))) if isinstance(value, list) else value


def _leaves(value: object) -> Iterator[object]:
    """Walk the values in nested dictionaries and lists."""
    if isinstance(value, Mapping):
        for nested in cast(Mapping[object, object], value).values():
            yield from _leaves(nested)
    elif isinstance(value, list | tuple):
        for nested in cast(list[object], value):
            yield from _leaves(nested)
    else:
        yield value


def kinds_of(annotation: object) -> Iterator[object]:
    """List the types of single values in a field's annotation: of `list[int] | Literal["all"]`, int and str.

    What is no class, as `Any` and aliases of it, is listed as `Any`.
    """
    if get_origin(annotation) is Literal:
        yield from (type(argument) for argument in get_args(annotation))
    elif get_origin(annotation) is Annotated:
        yield from kinds_of(get_args(annotation)[0])
    elif arguments := [argument for argument in get_args(annotation) if argument is not ...]:
        for argument in arguments:
            yield from kinds_of(argument)
    else:
        yield annotation if isinstance(annotation, type) else Any


def is_operation(field: FieldInfo) -> bool:
    """Return whether a field of a table may change between two starts."""
    return _OPERATION in field.metadata


def name_in(registry: Mapping[str, object]) -> AfterValidator:
    """Refuse a setting that names no entry of a registry; entries added later count too.

    Registries are dictionaries from a name to an algorithm: a new algorithm is one function and one entry.
    """

    def check(name: str) -> str:
        if name not in registry:
            known = ", ".join(f'"{known}"' for known in registry)
            raise ValueError(f'must be one of {known}, got "{name}"')
        return name

    return AfterValidator(check)
