"""From a config to the expert it names."""

from rayrl.config import HttpOracleConfig, OracleConfig, ReplayOracleConfig, ScriptedOracleConfig
from rayrl.models.judge_prompt import Rubric
from rayrl.oracles.protocol import Oracle
from rayrl.oracles.replay import ReplayOracle
from rayrl.oracles.scripted import ScriptedOracle


def build_oracle(config: OracleConfig, rubric: Rubric) -> Oracle:
    """The expert a config names, on a rubric.

    Raises:
        ConfigError: its key, function or address is unusable.
        DataError: its table is.
    """
    match config:
        case HttpOracleConfig():
            # The SDK takes a second to import: only those who use it pay that.
            from rayrl.oracles.http import HttpOracle

            return HttpOracle(config, rubric)
        case ScriptedOracleConfig():
            return ScriptedOracle(config, rubric)
        case ReplayOracleConfig():
            return ReplayOracle(config, rubric)
