"""Rollout: responses of the policy with their rewards, and the advantages that PPO learns from.

The fleets sample and score. Log-probabilities and values are read by the trainer itself, with the weights from which
the update starts, so that the probability ratio begins at one.
"""

import math
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, NamedTuple, TypedDict, get_args

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence

from rayrl.algorithms import ppo
from rayrl.algorithms.advantages import ADVANTAGES
from rayrl.algorithms.batching import micro_batches
from rayrl.config import PpoConfig
from rayrl.data.collate import TokenBatch, collate
from rayrl.engines.generator import Continuation, Sampling
from rayrl.fleets.fleet import Fleet
from rayrl.models.actor_critic import Actor, ActorCritic
from rayrl.models.packing import is_packed
from rayrl.models.policy import response_token_logprobs
from rayrl.models.served_reward import AbstentionReason, Reasons, ServedReward
from rayrl.records import Checkpoint, HeldOutAnswer, Scored, drawn_seed
from rayrl.training import deepspeed_engine as zero

if TYPE_CHECKING:
    from peft import PeftModel


class PromptRow(TypedDict):
    """One prompt to respond to."""

    id: str
    text: str
    token_ids: list[int]


@dataclass(frozen=True, kw_only=True)
class Rollout:
    """Responses to some prompts, by one version of the policy, with their rewards."""

    step: int
    """The update whose weights wrote them; 0 is M1."""
    prompts: list[PromptRow]
    """Of each response: a prompt with k of them stands k times, one after the other."""
    continuations: list[Continuation]
    rewards: list[float | None]
    """None is an abstention."""
    generate_s: float
    reward_s: float
    reasons: Reasons = field(default_factory=dict)
    """Of abstentions, by the number of the response."""


def sample(
    fleet: Fleet,
    policy: Checkpoint,
    prompts: list[PromptRow],
    sampling: Sampling,
    rewards: ServedReward,
    *,
    step: int,
    seed: str,
    k: int = 1,
) -> Rollout:
    """Sample k responses to each prompt, and score them.

    Args:
        fleet: generates.
        policy: the weights that must write the responses.
        prompts: may be none.
        sampling: temperature and lengths.
        rewards: scores. A reward that is no finite number counts as an abstention, since it would spread over the whole
            rollout.
        step: the update that the weights are from.
        seed: decides, with a prompt, the random streams of its responses.
        k: responses to each prompt.
    """
    if not prompts:
        return Rollout(step=step, prompts=[], continuations=[], rewards=[], generate_s=0.0, reward_s=0.0)
    started = time.monotonic()
    token_ids = [prompt["token_ids"] for prompt in prompts]
    seeds = [response_seeds(seed, prompt["id"], k) for prompt in prompts]

    def generate(part: slice) -> list[list[Continuation]]:
        return fleet.call("generate", policy, token_ids[part], seeds[part], sampling)

    continuations = [continuation for answers in fleet.map(len(prompts), generate) for continuation in answers]
    answered = [prompt for prompt in prompts for _ in range(k)]
    generated = time.monotonic()
    responses = [
        Scored(
            prompt=prompt["text"],
            response=continuation.text,
            token_ids=prompt["token_ids"] + continuation.token_ids,
        )
        for prompt, continuation in zip(answered, continuations, strict=True)
    ]
    reasons: Reasons = {}
    scores = rewards.score(responses, reasons)
    return Rollout(
        step=step,
        prompts=answered,
        continuations=continuations,
        rewards=[score if score is not None and math.isfinite(score) else None for score in scores],
        generate_s=generated - started,
        reward_s=time.monotonic() - generated,
        reasons=reasons,
    )


def response_seeds(seed: str, prompt_id: str, k: int) -> list[int]:
    """Draw the random streams of a prompt's k responses from the rollout's seed.

    They are numbered on from the first one's, as vLLM numbers the samples of one request.
    """
    first = drawn_seed("rollout", seed, prompt_id)
    return [(first + i) % 2**63 for i in range(k)]


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
    advantages: Tensor
    importance: Tensor
    """pi_old / pi_sampler, capped; 1 but for rounding when the sampler held the trainer's weights."""
    values: Tensor | None
    """Of the value function from which the update starts; None without one."""
    returns: Tensor | None
    """That the value function is fitted to."""

    @classmethod
    def zeros(cls, num_responses: int, num_tokens: int) -> "TokenTargets":
        """Targets of responses that do not count."""
        return cls(**{field.name: torch.zeros(num_responses, num_tokens) for field in fields(cls)})

    @classmethod
    def joined(cls, parts: "Sequence[TokenTargets]") -> "TokenTargets":
        """Stack the targets of several lots of responses."""
        width = max(part.logprobs.shape[1] for part in parts)
        joined: dict[str, Tensor | None] = {}
        for target in fields(cls):
            tensors: list[Tensor | None] = [getattr(part, target.name) for part in parts]
            padded = [pad(tensor, (0, width - tensor.shape[1])) for tensor in tensors if tensor is not None]
            joined[target.name] = torch.cat(padded) if padded else None  # there are no values without a value function
        return cls(**joined)  # type: ignore[arg-type]  # what was a tensor still is one

    def rows(self, rows: Sequence[int], num_tokens: int) -> "TokenTargets":
        """Take some responses, and of each the first tokens."""
        return self._map(lambda tensor: tensor[list(rows), :num_tokens])

    def to(self, device: torch.device) -> "TokenTargets":
        return self._map(lambda tensor: tensor.to(device))

    def _map(self, function: Callable[[Tensor], Tensor]) -> "TokenTargets":
        tensors: dict[str, Tensor | None] = vars(self)
        changed = {name: None if tensor is None else function(tensor) for name, tensor in tensors.items()}
        return TokenTargets(**changed)  # type: ignore[arg-type]  # what was a tensor still is one


MicroBatch = tuple[TokenBatch, TokenTargets]


@dataclass(frozen=True, kw_only=True)
class Experience:
    """N responses, with what PPO needs of each token, on the CPU."""

    ids: list[str]
    """Of the prompts, for messages."""
    prompts: list[list[int]]
    responses: list[list[int]]
    targets: TokenTargets
    sums: dict[str, float]
    """Over the responses: how many, their rewards, KL in nats, tokens, truncations, abstentions (with those of each
    reason), how many span two versions of the weights, and by how much trainer and replica differ on the
    log-probability of each token. Where responses are compared with each other, also how many were alone; with
    `ppo.reward_clip`, how many rewards were clipped."""

    def __len__(self) -> int:
        return len(self.prompts)

    @classmethod
    def joined(cls, parts: "Sequence[Experience]") -> "Experience":
        """Join the ranks' parts of a rollout, in the order in which its prompts were dealt."""
        return cls(
            ids=[name for part in parts for name in part.ids],
            prompts=[prompt for part in parts for prompt in part.prompts],
            responses=[response for part in parts for response in part.responses],
            targets=TokenTargets.joined([part.targets for part in parts]),
            sums={name: sum(part.sums[name] for part in parts) for name in parts[0].sums},
        )

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
    reference_logprobs: Tensor
    values: Tensor | None


def evaluate_rollout(
    engine: zero.Engine[Actor],
    reference: nn.Module | None,
    rollout: Rollout,
    config: PpoConfig,
    kl_coef: float,
) -> Experience:
    """Compute the advantages of a rollout. Empty and unrewarded responses are left out.

    So are responses that have no other one to be compared with, where the estimator of the advantages compares.

    Args:
        engine: the DeepSpeed engine around the networks.
        reference: the frozen M1's log-probabilities (`TokenLogprobs`), or None to read them from the policy without its
            adapters.
        rollout: this rank's share.
        config: estimator, discounts, scaling.
        kl_coef: reward taken per nat and token.
    """
    rewarded = [
        (prompt, continuation, reward)
        for prompt, continuation, reward in zip(rollout.prompts, rollout.continuations, rollout.rewards, strict=True)
        if reward is not None and continuation.token_ids
    ]
    group_sizes = Counter(prompt["id"] for prompt, _, _ in rewarded)
    least = 1 if config.trains_value else 2
    learnt_from = [row for row in rewarded if group_sizes[row[0]["id"]] >= least]
    ids = [prompt["id"] for prompt, _, _ in learnt_from]
    prompts = [prompt["token_ids"] for prompt, _, _ in learnt_from]
    kept = [continuation for _, continuation, _ in learnt_from]
    rewards = [reward for _, _, reward in learnt_from]
    responses = [continuation.token_ids for continuation in kept]
    mask = _padded([torch.ones(len(token_ids)) for token_ids in responses]).bool()
    scores = torch.tensor(rewards, dtype=torch.float32)
    is_finished = torch.tensor([continuation.finish_reason == "stop" for continuation in kept], dtype=torch.bool)
    # Shards of ZeRO-3 are brought to the device by its own hooks.
    is_elsewhere = config.reference_offload and config.zero_stage != 3
    with on_device(reference, engine.device) if reference is not None and is_elsewhere else nullcontext():
        read = read_tokens(engine, reference, prompts, responses, config.micro_batch_tokens)

    mean = mean_over_ranks(scores, engine) if config.center_rewards else 0.0
    bounded = ppo.centred_and_clipped(scores, mean=mean, clip=config.reward_clip)
    penalised = ppo.truncation_penalty(bounded, is_finished, config.truncation_penalty)
    kl = ppo.kl_penalty(read.logprobs, read.reference_logprobs, config.kl_estimator)
    shaped = ppo.shaped_rewards(penalised, kl, mask, kl_coef)
    advantages, returns = normalised_advantages(engine, shaped, read.values, mask, group_numbers(ids), config)

    # The responses may be older than the trainer's weights, and engines round in another way than the trainer.
    sampler_logprobs = _padded([torch.tensor(continuation.token_logprobs) for continuation in kept])
    importance = ppo.truncated_importance(read.logprobs, sampler_logprobs, config.importance_cap)
    log_ratio = torch.where(mask, read.logprobs - read.reference_logprobs, 0.0)
    sums = {
        "num_responses": len(kept),
        "reward": scores.sum().item(),
        "kl": log_ratio.sum().item(),  # unbiased, whichever estimator shapes the rewards
        "length": mask.sum().item(),
        "truncated": float((~is_finished).sum()),
        "spanning": sum(len(continuation.versions) > 1 for continuation in kept),
        "sampler_difference": torch.where(mask, (read.logprobs - sampler_logprobs).abs(), 0.0).sum().item(),
        "num_abstained": len(rollout.rewards) - len(rewarded),
        **{f"num_{reason}": list(rollout.reasons.values()).count(reason) for reason in get_args(AbstentionReason)},
    }
    if not config.trains_value:
        sums["num_alone"] = len(rewarded) - len(kept)
    if config.reward_clip is not None:
        sums["reward_clipped"] = float(((scores - mean).abs() > config.reward_clip).sum())
    return Experience(
        ids=ids,
        prompts=prompts,
        responses=responses,
        targets=TokenTargets(
            logprobs=read.logprobs,
            advantages=advantages,
            importance=importance,
            values=read.values,
            returns=returns,
        ),
        sums=sums,
    )


def group_numbers(ids: Sequence[str]) -> Tensor:
    """Number the prompts of some responses, from 0 in the order of their first response: (N,)."""
    numbers = {prompt_id: number for number, prompt_id in enumerate(dict.fromkeys(ids))}
    return torch.tensor([numbers[prompt_id] for prompt_id in ids], dtype=torch.int64)


def mean_over_ranks(scores: Tensor, engine: zero.Engine) -> float:
    """Return the mean score of all ranks' responses; 0 without any. All ranks take part."""
    total = zero.sum_over_ranks(scores.double().sum().item(), engine)
    return total / max(1.0, zero.sum_over_ranks(len(scores), engine))


@contextmanager
def on_device(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Move a model that is kept elsewhere to a device for as long as the context lasts."""
    home = next(model.parameters()).device
    model.to(device)
    try:
        yield
    finally:
        model.to(home)


def normalised_advantages(
    engine: zero.Engine, shaped: Tensor, values: Tensor | None, mask: Tensor, groups: Tensor, config: PpoConfig
) -> tuple[Tensor, Tensor | None]:
    """Return the advantages of shaped rewards, and the returns of the value function. All ranks take part.

    With values advantages are whitened. Without them they stay as they are: they have mean 0 in each group already. The
    moments are those of all ranks, so that a token is treated alike on whichever rank it is.
    """
    estimate = ADVANTAGES[config.advantages].estimate
    if values is None:
        returns = shaped.sum(1, keepdim=True)  # (N, 1): the score, and the KL penalties of all tokens
        if config.scale_rewards:
            returns = _scaled(engine, returns, torch.ones_like(returns))
        return torch.where(mask, estimate(returns.squeeze(1), groups).unsqueeze(1), 0.0), None
    if config.scale_rewards:
        shaped = _scaled(engine, shaped, mask)
    advantages, returns = estimate(shaped, values, mask, gamma=config.gamma, gae_lambda=config.gae_lambda)
    moments = zero.sum_tensor_over_ranks(ppo.masked_moments(advantages, mask), engine)
    return ppo.whiten(advantages, mask, moments), returns


def _scaled(engine: zero.Engine, rewards: Tensor, mask: Tensor) -> Tensor:
    moments = zero.sum_tensor_over_ranks(ppo.masked_moments(rewards, mask), engine)
    return ppo.scale_to_unit_std(rewards, mask, moments)


def read_tokens(
    engine: zero.Engine[Actor],
    reference: nn.Module | None,
    prompts: list[list[int]],
    responses: list[list[int]],
    max_tokens: int,
) -> TokenReadings:
    """Read log pi, log pi_ref and V, if there is a value function, of every response token. All ranks take part."""
    engine.eval()
    width = max(map(len, responses), default=1)
    trains_value = isinstance(engine.module, ActorCritic)
    read = torch.zeros(3 if trains_value else 2, len(responses), width)
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
            known = [logprobs, reference_logprobs] if values is None else [logprobs, reference_logprobs, values]
            outputs = torch.stack(known).float().cpu()
            # A batch is as wide as its longest response; a dummy's row is dropped.
            read[:, rows, : outputs.shape[2]] = outputs[:, : len(rows)]
    engine.train()
    return TokenReadings(read[0], read[1], read[2] if trains_value else None)


def _reference_logprobs(actor: Actor, reference: nn.Module | None, tokens: TokenBatch) -> Tensor:
    if reference is not None:
        return reference(tokens)
    policy: PeftModel = actor.policy  # type: ignore[assignment]  # without a reference it has adapters
    with policy.disable_adapter():
        return response_token_logprobs(policy, tokens)


def _padded(rows: list[Tensor]) -> Tensor:
    # A rank whose responses were all left out has none to pad.
    return pad_sequence(rows, batch_first=True) if rows else torch.zeros(0, 1)
