"""Build the oracle that a config names."""

import importlib
from collections.abc import Callable

from rayrl.config import OracleBase
from rayrl.models.judge_prompt import Rubric
from rayrl.oracles.protocol import Oracle


def build_oracle(config: OracleBase, rubric: Rubric) -> Oracle:
    """Build a config's implementation, on a rubric.

    Raises:
        ConfigError: its key, function or address is unusable.
        DataError: its table is.
    """
    module, _, name = config.implementation.partition(":")
    # Imported by name and only here: the SDK of a chat endpoint takes a second, and other types need not pay that.
    implementation: Callable[[OracleBase, Rubric], Oracle] = getattr(importlib.import_module(module), name)
    return implementation(config, rubric)
