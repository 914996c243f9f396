"""Where the curves go beside the run's own log and TensorBoard, which are always written."""

from typing import Literal

from pydantic import Field

from rayrl.config.table import Table


class WandbConfig(Table):
    """Weights & Biases."""

    project: str = Field(default="rayrl", min_length=1)
    entity: str | None = None
    mode: Literal["offline", "online"] = "offline"
    """"offline" writes to the run's folder, for `wandb sync`; "online" needs a key on the driver's node, in
    WANDB_API_KEY or in ~/.netrc."""


class MlflowConfig(Table):
    """MLflow."""

    tracking_uri: str | None = None
    """None is mlflow.db in the run's folder. Credentials are MLflow's own environment variables."""
    experiment: str = Field(default="rayrl", min_length=1)


class TrackingConfig(Table):
    """Experiment trackers; a table that is not there is not used."""

    wandb: WandbConfig | None = None
    mlflow: MlflowConfig | None = None
