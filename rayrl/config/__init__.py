"""One run as frozen pydantic models, read from one TOML file. A default is written once: here.

Importing this module loads no torch, ray or vllm, so that `--help`, `--plan` and a refusal take well under two seconds.
Values marked "ours" are not published for arXiv 2407.02119; see the README's table of open knobs.
"""

from rayrl.config.data import DataConfig, Dtype, PolicyConfig, PoolConfig, ReferenceAnswersConfig, SeedDataConfig
from rayrl.config.engines import EngineConfig, GenerateConfig
from rayrl.config.expert import (
    HttpOracleConfig,
    OracleConfig,
    OracleLimits,
    ReplayOracleConfig,
    RubricConfig,
    ScriptedOracleConfig,
    SelectConfig,
    Unit,
)
from rayrl.config.loading import load_config
from rayrl.config.rlp import (
    OcrmConfig,
    PpoConfig,
    PreferenceDataConfig,
    PreferencesConfig,
    RefreshConfig,
    RewardModelConfig,
    SpgConfig,
    UmlConfig,
)
from rayrl.config.run import EvaluateConfig, LmEvalConfig, RunConfig
from rayrl.config.table import Table
from rayrl.config.tracking import MlflowConfig, TrackingConfig, WandbConfig
from rayrl.config.training import DpoConfig, EvaluatorConfig, LoraConfig, PseudoLabelConfig, SftConfig, TrainingConfig

__all__ = [
    "DataConfig",
    "DpoConfig",
    "Dtype",
    "EngineConfig",
    "EvaluateConfig",
    "EvaluatorConfig",
    "GenerateConfig",
    "HttpOracleConfig",
    "LmEvalConfig",
    "LoraConfig",
    "MlflowConfig",
    "OcrmConfig",
    "OracleConfig",
    "OracleLimits",
    "PolicyConfig",
    "PoolConfig",
    "PpoConfig",
    "PreferenceDataConfig",
    "PreferencesConfig",
    "PseudoLabelConfig",
    "ReferenceAnswersConfig",
    "RefreshConfig",
    "ReplayOracleConfig",
    "RewardModelConfig",
    "RubricConfig",
    "RunConfig",
    "ScriptedOracleConfig",
    "SeedDataConfig",
    "SelectConfig",
    "SftConfig",
    "SpgConfig",
    "Table",
    "TrackingConfig",
    "TrainingConfig",
    "UmlConfig",
    "Unit",
    "WandbConfig",
    "load_config",
]
