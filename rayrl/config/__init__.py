"""Settings of one run: frozen pydantic models, read from one TOML file, with every default in one place.

One module holds one table; the rules between tables are in `rayrl.config.run`. Importing this package loads no torch,
scipy, ray or vllm, so that `--help`, `--plan` and a refusal take well under two seconds. Values marked "ours" are not
published for arXiv 2407.02119; jobs/README.md has a table of them.
"""

from rayrl.config.data import DataConfig, ReferenceAnswersConfig, SeedDataConfig
from rayrl.config.dpo import DpoConfig
from rayrl.config.engines import EngineConfig
from rayrl.config.evaluator import EvaluatorConfig
from rayrl.config.generate import GenerateConfig
from rayrl.config.loading import load_config
from rayrl.config.oracle import (
    FailoverEndpoint,
    HttpOracleConfig,
    LabelStudioOracleConfig,
    OracleBase,
    OracleConfig,
    PanelOracleConfig,
    PeopleConfig,
    ReplayOracleConfig,
    ScriptedOracleConfig,
    SheetOracleConfig,
)
from rayrl.config.policy import PolicyConfig
from rayrl.config.ppo import PpoConfig
from rayrl.config.preferences import PreferenceDataConfig, PreferencesConfig
from rayrl.config.pseudo_label import PseudoLabelConfig
from rayrl.config.refresh import OcrmConfig, RefreshConfig, SpgConfig, UmlConfig
from rayrl.config.reward_model import BottleneckConfig, RewardModelConfig
from rayrl.config.rubric import RubricConfig
from rayrl.config.run import RunConfig
from rayrl.config.select import SelectConfig
from rayrl.config.sft import SftConfig
from rayrl.config.table import Table
from rayrl.config.tracking import MlflowConfig, WandbConfig
from rayrl.config.training import EvaluatedTrainingConfig, LoraConfig, TrainingConfig

__all__ = [
    "BottleneckConfig",
    "DataConfig",
    "DpoConfig",
    "EngineConfig",
    "EvaluatedTrainingConfig",
    "EvaluatorConfig",
    "FailoverEndpoint",
    "GenerateConfig",
    "HttpOracleConfig",
    "LabelStudioOracleConfig",
    "LoraConfig",
    "MlflowConfig",
    "OcrmConfig",
    "OracleBase",
    "OracleConfig",
    "PanelOracleConfig",
    "PeopleConfig",
    "PolicyConfig",
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
    "SheetOracleConfig",
    "SpgConfig",
    "Table",
    "TrainingConfig",
    "UmlConfig",
    "WandbConfig",
    "load_config",
]
