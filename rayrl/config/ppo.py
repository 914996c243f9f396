"""Settings of proximal policy optimisation."""

from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from rayrl.algorithms.kl import KL_ESTIMATORS
from rayrl.config.table import Operation, name_in
from rayrl.config.training import LoraConfig, TrainingConfig


class PpoConfig(TrainingConfig):
    """M1 -> pi by PPO (arXiv 1707.06347).

    Responses are sampled at temperature 1, because the importance ratio is one of the policy's own probabilities.
    `batch_size` is in responses; `epochs` are passes over the prompts.
    """

    reward: Literal["reward_model", "evaluator", "function"] = "reward_model"
    """Source of a response's reward."""
    function: str | None = Field(default=None, pattern=r"^[\w.]+:\w+$")
    """reward = "function": "module:function" of (prompt, response) -> float, importable from the working directory. The
    prompt is the whole conversation as text."""
    rollout_size: int = Field(default=512, gt=0)
    """Prompts answered between two updates of the replicas' weights."""
    max_rollouts: int | None = Field(default=None, gt=0)
    """Stop after this many rollouts, even before `epochs` are over; None does not."""
    inner_epochs: int = Field(default=2, gt=0)
    """Passes over one rollout."""
    batch_size: int = Field(default=256, gt=0)
    """Responses per optimizer step, over all workers."""
    learning_rate: float = Field(default=1e-5, gt=0)
    kl_coef: float = Field(default=0.02, ge=0)
    """Reward per nat and token taken for leaving M1."""
    kl_estimator: Annotated[str, name_in(KL_ESTIMATORS)] = "k1"
    """Estimator of the KL at each token, a name in `rayrl.algorithms.kl`; "clamped" is AlpacaFarm's."""
    target_kl: float | None = Field(default=None, gt=0)
    """Nats per response; adapts kl_coef (arXiv 1909.08593). None keeps it fixed."""
    kl_horizon: int = Field(default=10_000, gt=0)
    """Responses over which kl_coef follows the KL."""
    max_kl: float = Field(default=100.0, gt=0)
    """Nats per response, mean of a rollout, at which the run stops: the policy has run away."""
    gamma: float = Field(default=1.0, gt=0, le=1)
    """Discount of rewards, per token."""
    gae_lambda: float = Field(default=1.0, ge=0, le=1)
    """Advantages from the value alone at 0 (least variance), from the returns alone at 1 (least bias)."""
    clip_range: float = Field(default=0.2, gt=0, lt=1)
    """Change of a token's probability, as a share of it, beyond which the policy loss is flat."""
    value_clip_range: float = Field(default=0.2, gt=0)
    """Change of a value, in reward, beyond which the value loss is flat."""
    value_coef: float = Field(default=0.1, gt=0)
    """Weight of the value loss beside the policy loss."""
    scale_rewards: bool = True
    """Divide the shaped rewards of a rollout by their standard deviation."""
    truncation_penalty: float = Field(default=0.0, ge=0)
    """Taken from the reward of a response that was cut off at generate.max_tokens."""
    overlap: bool = False
    """Sample the next rollout while this one trains: at most one update behind, corrected by the importance ratio.
    Responses that are being written when the weights change continue under the new ones."""
    weight_transfer: Operation[Literal["auto", "folder", "nccl"]] = "auto"
    """Way of the weights to the generators: through a folder, or over NCCL by vLLM's transfer, with the folder as its
    fallback. "auto" is the folder: NCCL has never been run."""
    importance_cap: float = Field(default=2.0, ge=1)
    """Largest importance ratio of a token between the training policy and the weights that sampled it."""
    evaluate_every: int = Field(default=10, gt=0)
    """Rollouts between two measurements of the reward on the held-out prompts."""
    keep: Literal["last", "best"] = "last"
    """Policy that later stages get: the last, or the one of the highest held-out reward (kept in either case)."""
    checkpoint_every: Operation[int] = Field(default=10, gt=0)
    """Rollouts between checkpoints."""

    @field_validator("lora")
    @classmethod
    def _reads_ratios(cls, lora: LoraConfig | None) -> LoraConfig | None:
        return cls.without_dropout(lora)

    @model_validator(mode="after")
    def _consistent(self) -> "PpoConfig":
        if (self.reward == "function") != (self.function is not None):
            raise ValueError('ppo.function and ppo.reward = "function" go together: set both or neither')
        if self.target_kl is not None and self.kl_coef == 0:
            raise ValueError(
                "ppo.kl_coef must be above 0 with ppo.target_kl, which multiplies it, got 0; raise it, or leave "
                "ppo.target_kl out"
            )
        if self.target_kl is not None and self.kl_horizon < self.rollout_size:
            raise ValueError(
                f"ppo.kl_horizon must be at least ppo.rollout_size ({self.rollout_size}), got {self.kl_horizon}: "
                "the coefficient would change its sign; raise it"
            )
        if self.batch_size > self.rollout_size:
            raise ValueError(
                f"ppo.batch_size must be at most ppo.rollout_size ({self.rollout_size}), got {self.batch_size}; "
                "lower it"
            )
        return self
