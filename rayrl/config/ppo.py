"""Settings of proximal policy optimisation."""

from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from rayrl.algorithms.advantages import ADVANTAGES
from rayrl.algorithms.kl import KL_ESTIMATORS
from rayrl.config.function_name import FunctionName
from rayrl.config.table import Operation, name_in
from rayrl.config.training import LoraConfig, TrainingConfig

VALUE_SETTINGS = (
    "gamma",
    "gae_lambda",
    "value_clip_range",
    "value_coef",
    "value_learning_rate",
    "value_warmup_steps",
)
"""Settings of the value function, and of the advantages that are read from it."""


class PpoConfig(TrainingConfig):
    """M1 -> pi by PPO (arXiv 1707.06347).

    Responses are sampled at temperature 1, because the importance ratio is one of the policy's own probabilities.
    `epochs` are passes over the prompts. A rollout has `rollout_size` prompts and `k` responses to each; `batch_size`
    is in responses. Where it does not divide `rollout_size * k`, the last optimizer step of each pass over a rollout
    takes the responses that are left. Losses are means over the tokens of a step.
    """

    reward: Literal["reward_model", "evaluator", "function"] = "reward_model"
    """Source of a response's reward."""
    function: FunctionName | None = None
    """reward = "function": "module:function" of (prompt, response) -> float, plain or async, found from the working
    directory. The prompt is the whole conversation as text. None abstains; an error stops the run."""
    function_timeout_s: Operation[float] = Field(default=60.0, gt=0)
    """reward = "function": longest wait for one call. A call beyond it is an abstention, and is counted; it goes on in
    its thread, so a function that asks a server should also have a limit of its own."""
    function_concurrency: Operation[int] = Field(default=16, gt=0)
    """reward = "function": calls at once on each worker, in threads. Set it to 1 for a function that several threads
    must not call at a time."""
    rollout_size: int = Field(default=512, gt=0)
    """Prompts answered between two updates of the replicas' weights, `k` times each."""
    k: int = Field(default=1, gt=0)
    """Responses to each prompt of a rollout."""
    advantages: Annotated[str, name_in(ADVANTAGES)] = "gae"
    """Estimator of the advantages, a name in `rayrl.algorithms.advantages`. "gae" (arXiv 1506.02438) trains a value
    function beside the policy. The others train none, and compare the k responses to a prompt: "rloo" with the mean of
    the others (arXiv 2402.14740), "group_mean" with the mean of all (Dr. GRPO, arXiv 2503.20783), "group_normalised" in
    standard deviations too (GRPO, arXiv 2402.03300). What they compare is a response's score less the KL penalties of
    all its tokens. An abstained response is no part of its group, and a group of one teaches nothing."""
    max_rollouts: int | None = Field(default=None, gt=0)
    """Stop after this many rollouts, even before `epochs` are over; None does not."""
    inner_epochs: int = Field(default=2, gt=0)
    """Passes over one rollout."""
    batch_size: int = Field(default=256, gt=0)
    """Responses per optimizer step, over all workers."""
    learning_rate: float = Field(default=1e-5, gt=0)
    """Highest learning rate, reached after the warm-up."""
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
    """Discount of rewards, per token; for "gae"."""
    gae_lambda: float = Field(default=1.0, ge=0, le=1)
    """Advantages from the value alone at 0 (least variance), from the returns alone at 1 (least bias); for "gae"."""
    clip_range: float = Field(default=0.2, gt=0, lt=1)
    """Change of a token's probability, as a share of it, beyond which the policy loss is flat."""
    clip_range_high: float | None = Field(default=None, gt=0)
    """The same for a rise of the probability ("clip-higher" of DAPO, arXiv 2503.14476, which takes 0.28 beside 0.2):
    unlikely tokens get more room to become likely. None is clip_range."""
    value_clip_range: float = Field(default=0.2, gt=0)
    """Change of a value, in reward, beyond which the value loss is flat (arXiv 2005.12729)."""
    value_coef: float = Field(default=0.1, gt=0)
    """Weight of the value loss beside the policy loss."""
    value_learning_rate: float | None = Field(default=None, gt=0)
    """Highest learning rate of the value function; None is learning_rate."""
    value_warmup_steps: int = Field(default=0, ge=0)
    """Optimizer steps at the start in which the value function alone learns (VC-PPO, arXiv 2503.01491, pretrains it
    too). The policy's learning rate is 0 until then, and its own warm-up and decay begin after them."""
    center_rewards: bool = False
    """Subtract a rollout's mean score from its scores, before the KL penalty. Groups of responses to one prompt are
    compared with each other, so that it changes nothing for them but what reward_clip cuts."""
    reward_clip: float | None = Field(default=None, gt=0)
    """Largest score either way, from the mean with center_rewards, else from 0; None does not clip. The curves show the
    reward as it was given, and the share that was clipped."""
    scale_rewards: bool = True
    """Divide the rewards of a rollout by their standard deviation: with "gae" the tokens' shaped rewards, otherwise the
    responses' returns (as arXiv 2508.08221 advises)."""
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
    reference_offload: Operation[bool] = False
    """Keep the reference M1 in the machine's memory, and on the device only while a rollout is read. With zero_stage 3
    the reference is sharded over the workers as the policy is, and its shards are kept there."""
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
        num_responses = self.responses_per_rollout
        shown = f"ppo.rollout_size * ppo.k ({num_responses})" if self.k > 1 else f"ppo.rollout_size ({num_responses})"
        if self.target_kl is not None and self.kl_horizon < num_responses:
            raise ValueError(
                f"ppo.kl_horizon must be at least {shown}, got {self.kl_horizon}: the coefficient would change its "
                "sign; raise it"
            )
        if self.batch_size > num_responses:
            raise ValueError(f"ppo.batch_size must be at most {shown}, got {self.batch_size}; lower it")
        if self.lora is not None and self.reference_offload:
            raise ValueError(
                "ppo.reference_offload must be false with ppo.lora: the reference is the policy without its adapters; "
                "leave it out"
            )
        if not self.trains_value:
            self._refuse_without_value()
        return self

    def _refuse_without_value(self) -> None:
        """Refuse settings that mean nothing without a value function, and groups of one."""
        if self.k < 2:
            raise ValueError(
                f'ppo.k must be at least 2 when ppo.advantages is "{self.advantages}", which compares the responses to '
                f"a prompt, got {self.k}; raise it"
            )
        for name in VALUE_SETTINGS:
            value = getattr(self, name)
            if value != type(self).model_fields[name].default:
                raise ValueError(
                    f'ppo.{name} must be left out when ppo.advantages is "{self.advantages}", which trains no value '
                    f'function, got {value}; leave it out, or set ppo.advantages = "gae"'
                )

    @property
    def trains_value(self) -> bool:
        """True if the advantages read a value function, which is then trained beside the policy."""
        return ADVANTAGES[self.advantages].reads_values

    @property
    def responses_per_rollout(self) -> int:
        return self.rollout_size * self.k

    def num_rollouts(self, num_prompts: int) -> int:
        """Return the rollouts of a whole training."""
        rollouts = self.epochs * -(-num_prompts // self.rollout_size)
        return min(rollouts, self.max_rollouts or rollouts)

    def num_updates(self, num_prompts: int) -> int:
        """Return the optimizer steps of a whole training, if every response is rewarded."""
        steps_per_pass = -(-self.responses_per_rollout // self.batch_size)
        return self.num_rollouts(num_prompts) * self.inner_epochs * steps_per_pass
