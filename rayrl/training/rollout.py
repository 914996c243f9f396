"""Rollout: responses of the policy with their rewards, and the advantages that PPO learns from.

The fleets sample and score. Log-probabilities and values are read by the trainer itself, with the weights from which
the update starts, so that the probability ratio begins at one.
"""

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, NamedTuple, TypedDict

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from rayrl.algorithms import ppo
from rayrl.algorithms.batching import micro_batches
from rayrl.config import PpoConfig
from rayrl.data.collate import TokenBatch, collate
from rayrl.engines.generator import Continuation, Sampling
from rayrl.fleets.fleet import Fleet
from rayrl.models.actor_critic import ActorCritic
from rayrl.models.packing import is_packed
from rayrl.models.policy import response_token_logprobs
from rayrl.models.served_reward import ServedReward
from rayrl.records import Checkpoint, HeldOutAnswer, Scored, drawn_seed
from rayrl.training import deepspeed_engine as zero

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel


class PromptRow(TypedDict):
    """One prompt to respond to."""

    id: str
    text: str
    token_ids: list[int]


@dataclass(frozen=True, kw_only=True)
class Rollout:
    """One response to each of some prompts, by one version of the policy, with its reward."""

    step: int
    """The update whose weights wrote them; 0 is M1."""
    prompts: list[PromptRow]
    continuations: list[Continuation]
    rewards: list[float | None]
    """None is an abstention."""
    generate_s: float
    reward_s: float


def sample(
    fleet: Fleet,
    policy: Checkpoint,
    prompts: list[PromptRow],
    sampling: Sampling,
    rewards: ServedReward,
    *,
    step: int,
    seed: str,
) -> Rollout:
    """Sample one response to each prompt, and score it.

    Args:
        fleet: generates.
        policy: the weights that must write the responses.
        prompts: may be none.
        sampling: temperature and lengths.
        rewards: scores. A reward that is no finite number counts as an abstention, since it would spread over the whole
            rollout.
        step: the update that the weights are from.
        seed: decides, with a prompt, the random stream of its response.
    """
    if not prompts:
        return Rollout(step=step, prompts=[], continuations=[], rewards=[], generate_s=0.0, reward_s=0.0)
    started = time.monotonic()
    token_ids = [prompt["token_ids"] for prompt in prompts]
    seeds = [[response_seed(seed, prompt["id"])] for prompt in prompts]

    def generate(part: slice) -> list[list[Continuation]]:
        return fleet.call("generate", policy, token_ids[part], seeds[part], sampling)

    continuations = [continuation for (continuation,) in fleet.map(len(prompts), generate)]
    generated = time.monotonic()
    responses = [
        Scored(
            prompt=prompt["text"],
            response=continuation.text,
            token_ids=prompt["token_ids"] + continuation.token_ids,
        )
        for prompt, continuation in zip(prompts, continuations, strict=True)
    ]
    scores = rewards.score(responses)
    return Rollout(
        step=step,
        prompts=prompts,
        continuations=continuations,
        rewards=[score if score is not None and math.isfinite(score) else None for score in scores],
        generate_s=generated - started,
        reward_s=time.monotonic() - generated,
    )


def response_seed(seed: str, prompt_id: str) -> int:
    """Draw the random stream of a prompt's response from the rollout's seed."""
    return drawn_seed("rollout", seed, prompt_id)


def held_out_answers(rollout: Rollout) -> list[HeldOutAnswer]:
    """Return a rollout on held-out prompts as records."""
    answers: list[HeldOutAnswer] = []
    for prompt, continuation, reward in zip(rollout.prompts, rollout.continuations, rollout.rewards, strict=True):
        answer = HeldOutAnswer(
            prompt_id=prompt["id"],
            prompt=prompt["text"],
            prompt_token_ids=prompt["token_ids"],
            response=continuation.text,
            token_ids=continuation.token_ids,
            reward=reward,
        )
        answers.append(answer)
    return answers


@dataclass(frozen=True, kw_only=True)
class TokenTargets:
    """Inputs of the losses for each response token besides the networks' outputs: (N, R), padded on the right."""

    logprobs: Tensor
    """Under the policy from which the update starts, nats."""
    values: Tensor
    """Of the value function from which the update starts."""
    advantages: Tensor
    returns: Tensor
    importance: Tensor
    """pi_old / pi_sampler, capped; 1 but for rounding when the sampler held the trainer's weights."""

    @classmethod
    def zeros(cls, num_responses: int, num_tokens: int) -> "TokenTargets":
        """Targets of responses that do not count."""
        return cls(**{field.name: torch.zeros(num_responses, num_tokens) for field in fields(cls)})

    def rows(self, rows: Sequence[int], num_tokens: int) -> "TokenTargets":
        """Take some responses, and of each the first tokens."""
        return TokenTargets(**{name: tensor[list(rows), :num_tokens] for name, tensor in vars(self).items()})

    def to(self, device: torch.device) -> "TokenTargets":
        return TokenTargets(**{name: tensor.to(device) for name, tensor in vars(self).items()})


MicroBatch = tuple[TokenBatch, TokenTargets]


@dataclass(frozen=True, kw_only=True)
class Experience:
    """N responses of this rank, with what PPO needs of each token, on the CPU."""

    ids: list[str]
    """Of the prompts, for messages."""
    prompts: list[list[int]]
    responses: list[list[int]]
    targets: TokenTargets
    sums: dict[str, float]
    """Over this rank's responses: how many, their rewards, KL in nats, tokens, truncations, abstentions, and how many
    span two versions of the weights."""

    def __len__(self) -> int:
        return len(self.prompts)

    def micro_batches(self, indices: Sequence[int], max_tokens: int, packed: bool) -> Iterator[MicroBatch]:
        """Yield the given responses in batches of at most `max_tokens`, with their targets."""
        lengths = [[len(self.prompts[i]) + len(self.responses[i])] for i in indices]
        for batch in micro_batches(lengths, max_tokens, is_packed=packed):
            rows = [indices[n] for n in batch]
            tokens = collate([self.prompts[i] for i in rows], [self.responses[i] for i in rows])
            yield tokens, self.targets.rows(rows, tokens.response_ids.shape[1])


class TokenReadings(NamedTuple):
    """Outputs of the networks for the tokens of N responses, (N, R), padded on the right, on the CPU."""

    logprobs: Tensor
    values: Tensor
    reference_logprobs: Tensor


def evaluate_rollout(
    engine: zero.Engine[ActorCritic],
    reference: "PreTrainedModel | None",
    rollout: Rollout,
    config: PpoConfig,
    kl_coef: float,
) -> Experience:
    """Compute the advantages of a rollout. Empty and unrewarded responses are left out.

    Args:
        engine: the DeepSpeed engine around `ActorCritic`.
        reference: the frozen M1, or None to read it from the policy without its adapters.
        rollout: this rank's share.
        config: estimator, discounts, scaling.
        kl_coef: reward taken per nat and token.
    """
    ids: list[str] = []
    prompts: list[list[int]] = []
    kept: list[Continuation] = []
    rewards: list[float] = []
    for prompt, continuation, reward in zip(rollout.prompts, rollout.continuations, rollout.rewards, strict=True):
        if reward is not None and continuation.token_ids:
            ids.append(prompt["id"])
            prompts.append(prompt["token_ids"])
            kept.append(continuation)
            rewards.append(reward)
    responses = [continuation.token_ids for continuation in kept]
    mask = _padded([torch.ones(len(token_ids)) for token_ids in responses]).bool()
    scores = torch.tensor(rewards, dtype=torch.float32)
    is_finished = torch.tensor([continuation.finish_reason == "stop" for continuation in kept], dtype=torch.bool)
    read = read_tokens(engine, reference, prompts, responses, config.micro_batch_tokens)

    penalised = ppo.truncation_penalty(scores, is_finished, config.truncation_penalty)
    kl = ppo.kl_penalty(read.logprobs, read.reference_logprobs, config.kl_estimator)
    shaped = ppo.shaped_rewards(penalised, kl, mask, kl_coef)
    advantages, returns = normalised_advantages(engine, shaped, read.values, mask, config)

    # The responses may be older than the trainer's weights, and engines round in another way than the trainer.
    sampler_logprobs = _padded([torch.tensor(continuation.token_logprobs) for continuation in kept])
    importance = ppo.truncated_importance(read.logprobs, sampler_logprobs, config.importance_cap)
    log_ratio = torch.where(mask, read.logprobs - read.reference_logprobs, 0.0)
    return Experience(
        ids=ids,
        prompts=prompts,
        responses=responses,
        targets=TokenTargets(
            logprobs=read.logprobs,
            values=read.values,
            advantages=advantages,
            returns=returns,
            importance=importance,
        ),
        sums={
            "num_responses": len(kept),
            "reward": scores.sum().item(),
            "kl": log_ratio.sum().item(),  # unbiased, whichever estimator shapes the rewards
            "length": mask.sum().item(),
            "truncated": float((~is_finished).sum()),
            "spanning": sum(len(continuation.versions) > 1 for continuation in kept),
            "num_abstained": len(rollout.rewards) - len(kept),
        },
    )


def normalised_advantages(
    engine: zero.Engine, shaped: Tensor, values: Tensor, mask: Tensor, config: PpoConfig
) -> tuple[Tensor, Tensor]:
    """Return whitened advantages, and returns, of shaped rewards. All ranks take part.

    The moments are those of all ranks, so that a token is treated alike on whichever rank it is.
    """
    if config.scale_rewards:
        moments = zero.sum_tensor_over_ranks(ppo.masked_moments(shaped, mask), engine)
        shaped = ppo.scale_to_unit_std(shaped, mask, moments)
    advantages, returns = ppo.gae(shaped, values, mask, gamma=config.gamma, gae_lambda=config.gae_lambda)
    moments = zero.sum_tensor_over_ranks(ppo.masked_moments(advantages, mask), engine)
    return ppo.whiten(advantages, mask, moments), returns


def read_tokens(
    engine: zero.Engine[ActorCritic],
    reference: "PreTrainedModel | None",
    prompts: list[list[int]],
    responses: list[list[int]],
    max_tokens: int,
) -> TokenReadings:
    """Read log pi, V and log pi_ref of every response token. All ranks take part."""
    engine.eval()
    width = max(map(len, responses), default=1)
    read = torch.zeros(3, len(responses), width)
    lengths = [[len(prompt) + len(response)] for prompt, response in zip(prompts, responses, strict=True)]
    batches = micro_batches(lengths, max_tokens, is_packed=is_packed(engine.module.policy))
    with torch.no_grad():
        # Under ZeRO-3 a forward pass is a collective: ranks with fewer batches read a dummy beside the others.
        for n in range(int(zero.max_over_ranks(len(batches), engine))):
            rows = batches[n] if n < len(batches) else []
            if rows:
                tokens = collate([prompts[i] for i in rows], [responses[i] for i in rows])
            else:
                tokens = collate([[0]], [[0]])
            tokens = tokens.to(engine.device)
            logprobs, values = engine(tokens)
            reference_logprobs = _reference_logprobs(engine.module, reference, tokens)
            outputs = torch.stack([logprobs, values, reference_logprobs]).float().cpu()
            # A batch is as wide as its longest response; a dummy's row is dropped.
            read[:, rows, : outputs.shape[2]] = outputs[:, : len(rows)]
    engine.train()
    return TokenReadings(*read)


def _reference_logprobs(actor_critic: ActorCritic, reference: "PreTrainedModel | None", tokens: TokenBatch) -> Tensor:
    if reference is not None:
        return response_token_logprobs(reference, tokens)
    policy: PeftModel = actor_critic.policy  # type: ignore[assignment]  # without a reference it has adapters
    with policy.disable_adapter():
        return response_token_logprobs(policy, tokens)


def _padded(rows: list[Tensor]) -> Tensor:
    # A rank whose responses were all left out has none to pad.
    return pad_sequence(rows, batch_first=True) if rows else torch.zeros(0, 1)
