"""The base of every TOML table."""

from pydantic import BaseModel, ConfigDict


class Table(BaseModel):
    """Base of every TOML table: frozen, and an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())
