"""Base of every TOML table, and the type of settings that name an entry of a registry."""

from collections.abc import Mapping

from pydantic import AfterValidator, BaseModel, ConfigDict


class Table(BaseModel):
    """Base of every TOML table: frozen, and an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())


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
