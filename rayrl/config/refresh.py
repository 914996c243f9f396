"""Settings of the refresh of the reward model on the policy's own samples (RLP), and of its controls."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from rayrl.algorithms.clustering import CLUSTERINGS
from rayrl.config.table import Operation, Place, Table, name_in


class SpgConfig(Table):
    """Synthetic preference generation: clusters of responses that mean the same."""

    gamma: float = Field(default=0.5, ge=0, le=1)
    """Least confidence, the largest cluster's share, that makes a pair. 0 is the control Select-All."""
    clustering: Annotated[str, name_in(CLUSTERINGS)] = "strict"
    """A published definition of bidirectional entailment, or "embedding", a threshold on cosines; see
    `rayrl.algorithms.clustering`. If entailment accepts no prompt at all, the embeddings are clustered too, and the
    number of pairs they would give is reported."""
    entailment_model: Place = "microsoft/deberta-large-mnli"
    """A sequence classifier with the three MNLI labels: a folder or hub id."""
    embedder: Place | None = None
    """embedding: a sentence-embedding model's folder or hub id; None embeds with M1."""
    threshold: float = Field(default=0.9, gt=-1, le=1)
    """embedding: cosine at or above which two responses mean the same."""
    max_tokens: int = Field(default=512, gt=8)
    """Longest pair the entailment model reads; longer answers lose their ends, and are counted."""
    num_replicas: Operation[int] = Field(default=1, gt=0)
    """Actors that serve the entailment model."""


class UmlConfig(Table):
    """Unsupervised multi-view learning: an information bottleneck on the reward model's last layer."""

    weight: float = Field(default=0.5, ge=0)
    """lambda: L = L_BT + lambda L_M."""
    objective: Literal["uml", "mvi", "infomax", "contrastive"] = "uml"
    """A name in `rayrl.algorithms.information.UML_OBJECTIVES`, which is not read here: it needs torch."""
    learning_rate: float = Field(default=1e-3, gt=0)
    """Highest learning rate of the encoder and the critic, which start from nothing; both have the reward model's
    schedule. The release of arXiv 2002.07017 has 1e-4, for a million steps; a refresh has hundreds (ours)."""
    skl_weight: float = Field(default=1.0, ge=0)
    """uml: weight of the divergence of the two codes, once it has risen."""
    skl_start: float = Field(default=1e-3, gt=0, le=1)
    """uml: the weight starts at this times skl_weight, and rises exponentially, as in that release."""
    skl_rise: tuple[float, float] = (0.25, 0.75)
    """uml: shares of the training's steps at which the rise begins and ends (ours)."""
    z_dim: int = Field(default=64, gt=0)
    """Dimensions of a code."""
    hidden_dim: int = Field(default=1024, gt=0)
    """Width of the encoder's and the critic's hidden layers."""
    batch_size: int = Field(default=16, gt=1)
    """Prompts whose two views join every optimizer step, over all workers; at least two for each (ours)."""

    @model_validator(mode="after")
    def _rises_in_order(self) -> "UmlConfig":
        begin, end = self.skl_rise
        if not 0 <= begin <= end <= 1:
            raise ValueError(
                f"refresh.uml.skl_rise must be two shares between 0 and 1, the smaller one first, got {self.skl_rise}; "
                "(0, 0) has the whole weight from the first step on"
            )
        return self


class OcrmConfig(Table):
    """Importance-weighted preferences (arXiv 2507.15507)."""

    alpha: float = Field(default=0.1, ge=0, le=1)
    """Bounds the density ratio by 1 / alpha: 0 is the plain ratio, 1 weighs all pairs alike."""
    multiplier: float = Field(default=0.001, ge=0)
    """Exponent of a pair's ratios; 0 weighs all pairs alike."""


class RefreshConfig(Table):
    """r -> r^: the reward model made to fit the policy's own samples, without a new label."""

    method: Literal["spg", "uml", "reward_pairs", "self_judged", "ocrm", "none"] = "spg"
    """spg and uml are the paper's. Controls: pairs ranked by the reward model, pairs judged by the policy itself
    (RLAIF), importance-weighted preferences, and a second PPO on the old reward model ("none")."""
    n: int = Field(default=10, ge=2)
    """Responses per prompt sampled from pi."""
    temperature: float = Field(default=1.0, gt=0)
    """Temperature of these samples."""
    num_prompts: int | None = Field(default=None, gt=0)
    """Sample for this many prompts of the pool, rounded up to whole blocks; None is all of them."""
    spg: SpgConfig = SpgConfig()
    uml: UmlConfig = UmlConfig()
    ocrm: OcrmConfig = OcrmConfig()
