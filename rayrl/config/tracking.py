"""Settings of experiment trackers. The run's own log and its TensorBoard files are written in any case."""

from typing import Literal

from pydantic import Field

from rayrl.config.table import Table


class WandbConfig(Table):
    """Weights & Biases."""

    project: str = Field(default="rayrl", min_length=1)
    """Project there, in which the run appears."""
    entity: str | None = None
    """User or team that owns the project; None is the key's own."""
    mode: Literal["offline", "online"] = "offline"
    """"offline" writes to the run's folder, for `wandb sync`; "online" needs a key on the driver's node, in
    WANDB_API_KEY or in ~/.netrc."""


class MlflowConfig(Table):
    """MLflow."""

    tracking_uri: str | None = None
    """None is mlflow.db in the run's folder. Credentials are MLflow's own environment variables."""
    experiment: str = Field(default="rayrl", min_length=1)
    """Experiment there, in which the run appears."""


class TrackingConfig(Table):
    """Experiment trackers; a tracker without a table is not used."""

    wandb: WandbConfig | None = None
    mlflow: MlflowConfig | None = None
