"""Reward learning on policy: preferences, the reward model, PPO, and the refresh of the reward model between two PPOs.

Defaults named "AlpacaFarm" are those of the release that arXiv 2403.19279 builds on; "ours" are not published.
"""

from typing import Literal

from pydantic import Field, model_validator

from rayrl.config.data import DataConfig
from rayrl.config.table import Table
from rayrl.config.training import TrainingConfig


class PreferenceDataConfig(DataConfig):
    """Pairs somebody has judged: chosen and rejected answers, or several answers with their ranks."""

    chosen_column: str = "chosen"
    rejected_column: str = "rejected"
    replies_column: str | None = None
    """A list of {"text", "rank"} per row (rank 0 is best); replaces the two columns by all ordered pairs."""


class PreferencesConfig(Table):
    """D: where the preference pairs come from."""

    source: Literal["data", "oracle"] = "data"
    """"oracle" asks about pairs of on-policy responses to a prompt, `select.budget` paid queries in all."""
    data: PreferenceDataConfig | None = None
    order: Literal["both", "random"] = "both"
    """oracle: ask both orders (two queries a pair; a disagreement is a tie), or one drawn order, recorded."""
    pairs_per_prompt: int = Field(default=1, gt=0)
    """oracle: pairs of a prompt's responses, no response in two of them."""

    @model_validator(mode="after")
    def _data_is_named(self) -> "PreferencesConfig":
        if self.source == "data" and self.data is None:
            raise ValueError('preferences.data is missing: name a file of pairs, or set preferences.source = "oracle"')
        return self


class RewardModelConfig(TrainingConfig):
    """r: Bradley-Terry on the last token's hidden state, from M1."""

    path: str | None = None
    """A ready-made reward model instead of a fitted r: a folder written by this stage in another run. A refresh still
    fits r^, from M1."""
    num_members: int = Field(default=1, gt=0)
    """Reward models trained on the same pairs with seeds of their own: an ensemble."""
    objective: Literal["mean", "worst_case", "uncertainty_weighted"] = "mean"
    """How an ensemble's rewards become one (arXiv 2310.02743)."""
    variance_coef: float = Field(default=0.5, ge=0)
    """uncertainty_weighted: reward = mean - variance_coef x variance."""
    holdout: float = Field(default=0.1, gt=0, lt=1)
    """Share of the prompts whose pairs are kept back to measure accuracy and calibration."""
    learning_rate: float = Field(default=3e-6, gt=0)
    batch_size: int = Field(default=16, gt=0)

    @model_validator(mode="after")
    def _one_ready_made(self) -> "RewardModelConfig":
        if self.path is not None and self.num_members > 1:
            raise ValueError(
                f"reward_model.num_members must be 1 with a ready-made reward_model.path, got {self.num_members}"
            )
        return self


class PpoConfig(TrainingConfig):
    """M1 -> pi by PPO (arXiv 1707.06347), sampled at temperature 1: the ratio is of what the policy is.

    `batch_size` is in responses; `epochs` are passes over the prompts.
    """

    reward: Literal["reward_model", "evaluator", "function"] = "reward_model"
    function: str | None = Field(default=None, pattern=r"^[\w.]+:\w+$")
    """reward = "function": "module:function" of (prompt, response) -> float, importable from the working directory."""
    rollout_size: int = Field(default=512, gt=0)
    """Prompts answered between two updates of the replicas' weights."""
    max_rollouts: int | None = Field(default=None, gt=0)
    """Stop after so many, whatever `epochs` says."""
    inner_epochs: int = Field(default=2, gt=0)
    """Passes over one rollout."""
    batch_size: int = Field(default=256, gt=0)
    learning_rate: float = Field(default=1e-5, gt=0)
    kl_coef: float = Field(default=0.02, ge=0)
    """Reward per nat and token taken for leaving M1."""
    kl_estimator: Literal["k1", "k2", "k3", "clamped"] = "k1"
    """"clamped" is AlpacaFarm's."""
    target_kl: float | None = Field(default=None, gt=0)
    """Nats per response; adapts kl_coef (arXiv 1909.08593). None keeps it fixed."""
    kl_horizon: int = Field(default=10_000, gt=0)
    """Responses over which kl_coef follows the KL."""
    max_kl: float = Field(default=100.0, gt=0)
    """Nats per response, mean of a rollout, at which the run stops: the policy has run away."""
    gamma: float = Field(default=1.0, gt=0, le=1)
    gae_lambda: float = Field(default=1.0, ge=0, le=1)
    clip_range: float = Field(default=0.2, gt=0, lt=1)
    value_clip_range: float = Field(default=0.2, gt=0)
    value_coef: float = Field(default=0.1, gt=0)
    scale_rewards: bool = True
    """Divide the shaped rewards of a rollout by their standard deviation."""
    truncation_penalty: float = Field(default=0.0, ge=0)
    """Taken from the reward of a response that was cut off at generate.max_tokens."""
    overlap: bool = False
    """Sample the next rollout while this one trains: at most one update behind, corrected by the importance ratio. What
    is being written when the weights change goes on under the new ones."""
    weight_transfer: Literal["auto", "folder", "nccl"] = Field(default="auto", exclude_if=lambda way: way == "auto")
    """How weights reach the generators: through a folder, or over NCCL by vLLM's transfer, the folder behind it. "auto"
    is the folder: NCCL has never been run."""
    importance_cap: float = Field(default=2.0, ge=1)
    evaluate_every: int = Field(default=10, gt=0)
    """Rollouts between two measurements of the reward on the held-out prompts."""
    keep: Literal["last", "best"] = "last"
    """Which policy goes on: the last, or the one of the highest held-out reward (kept in either case)."""
    checkpoint_every: int = Field(default=10, gt=0)
    """Rollouts between checkpoints."""

    @model_validator(mode="after")
    def _consistent(self) -> "PpoConfig":
        if (self.reward == "function") != (self.function is not None):
            raise ValueError('ppo.function and ppo.reward = "function" go together: set both or neither')
        if self.target_kl is not None and self.kl_coef == 0:
            raise ValueError("ppo.kl_coef must be above 0 with ppo.target_kl, which multiplies it; got 0")
        if self.target_kl is not None and self.kl_horizon < self.rollout_size:
            raise ValueError(
                f"ppo.kl_horizon must be at least ppo.rollout_size ({self.rollout_size}), got {self.kl_horizon}: "
                "the coefficient would change its sign"
            )
        if self.batch_size > self.rollout_size:
            raise ValueError(
                f"ppo.batch_size must be at most ppo.rollout_size ({self.rollout_size}), got {self.batch_size}"
            )
        return self


class SpgConfig(Table):
    """Synthetic preference generation: clusters of responses that mean the same."""

    gamma: float = Field(default=0.5, ge=0, le=1)
    """Least confidence, the largest cluster's share, that makes a pair. 0 is the control Select-All."""
    clustering: Literal["strict", "kuhn2023", "farquhar2024", "embedding"] = "strict"
    """Which published definition of bidirectional entailment, or a threshold on embeddings. If entailment accepts no
    prompt at all, the embeddings are clustered beside it, and how many pairs they would give is reported."""
    entailment_model: str = "microsoft/deberta-large-mnli"
    """A sequence classifier with the three MNLI labels: a folder or hub id."""
    embedder: str | None = None
    """embedding: a sentence-embedding model's folder or hub id; None embeds with M1."""
    threshold: float = Field(default=0.9, gt=-1, le=1)
    """embedding: cosine at or above which two responses mean the same."""
    max_tokens: int = Field(default=512, gt=8)
    """Longest pair the entailment model reads; longer answers lose their ends, and are counted."""
    num_replicas: int = Field(default=1, gt=0)
    """Actors that serve the entailment model."""


class UmlConfig(Table):
    """Unsupervised multi-view learning: an information bottleneck on the reward model's last layer."""

    weight: float = Field(default=0.5, ge=0)
    """lambda: L = L_BT + lambda L_M."""
    objective: Literal["uml", "mvi", "infomax", "contrastive"] = "uml"
    skl_weight: float = Field(default=1.0, ge=0)
    z_dim: int = Field(default=64, gt=0)
    hidden_dim: int = Field(default=1024, gt=0)
    batch_size: int = Field(default=16, gt=1)
    """Prompts whose two views join every optimizer step (ours)."""


class OcrmConfig(Table):
    """Importance-weighted preferences (arXiv 2507.15507)."""

    alpha: float = Field(default=0.1, ge=0, le=1)
    multiplier: float = Field(default=0.001, ge=0)


class RefreshConfig(Table):
    """r -> r^: the reward model made to fit the policy's own samples, without a new label."""

    method: Literal["spg", "uml", "reward_pairs", "self_judged", "ocrm", "none"] = "spg"
    """spg and uml are the paper's. Controls: pairs ranked by the reward model, pairs judged by the policy itself
    (RLAIF), importance-weighted preferences, and a second PPO on the old reward model ("none")."""
    n: int = Field(default=10, ge=2)
    """Responses per prompt sampled from pi."""
    temperature: float = Field(default=1.0, gt=0)
    num_prompts: int | None = Field(default=None, gt=0)
    """Sample only so many prompts of the pool, rounded up to whole blocks."""
    spg: SpgConfig = SpgConfig()
    uml: UmlConfig = UmlConfig()
    ocrm: OcrmConfig = OcrmConfig()
