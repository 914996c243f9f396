"""Build the oracle, and the people's desk, that a config names."""

import importlib
from collections.abc import Callable
from typing import Any

from rayrl.config import OracleBase, PeopleConfig
from rayrl.models.judge_prompt import Rubric
from rayrl.oracles.people.desk import Desk
from rayrl.oracles.protocol import Oracle


def build_oracle(config: OracleBase, rubric: Rubric) -> Oracle:
    """Build a config's implementation, on a rubric.

    Raises:
        ConfigError: its key, function or address is unusable.
        DataError: its table is.
    """
    return _implementation(config)(config, rubric)


def build_desk(config: PeopleConfig, rubric: Rubric, setting: str = "oracle") -> Desk:
    """Build the desk at which a config's people answer; its messages name the table of settings so.

    Raises:
        ConfigError: its key or address is unusable.
    """
    return _implementation(config)(config, rubric, setting)


def check_oracle(config: OracleBase, rubric: Rubric) -> None:
    """Make sure that judges and people can be asked, without asking any.

    Raises:
        ConfigError, DataError: they cannot; names the wrong setting, or the row, and the remedy.
    """
    build_oracle(config, rubric).check()
    people = config.people_asked()
    if people is not None and people is not config:
        build_desk(people, rubric, "oracle.people").check()


def _implementation(config: OracleBase) -> Callable[..., Any]:
    module, _, name = config.implementation.partition(":")
    # Imported by name and only here: the SDK of a chat endpoint takes a second, and other types need not pay that.
    return getattr(importlib.import_module(module), name)
