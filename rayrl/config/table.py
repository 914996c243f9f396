"""Base of every TOML table; the marks that tell a run's operation from its science; settings that name an entry.

A run's science (data, models, seeds, losses, selection, rubric, judge) is its identity. Its operation (limits, prices,
places, workers) is how it is carried out, and may change between two starts. A field says which it is: its type is
`Operation[...]`, or it is science.
"""

import json
from collections.abc import Mapping
from typing import Annotated, Any, TypeVar, cast

from pydantic import AfterValidator, BaseModel, ConfigDict
from pydantic.fields import FieldInfo

T = TypeVar("T")

_OPERATION, _GROWING = "operation", "growing"

Operation = Annotated[T, _OPERATION]
"""Type of a setting that may change between two starts of a run: it is in no key, and repeats no work."""
Growing = Annotated[T, _GROWING]
"""Type of a number that may be raised between two starts. It is in the keys: what it decides is done again."""


class Table(BaseModel):
    """Base of every TOML table: frozen, and an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

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
