"""A rollout: what the policy says, what that is worth, and the advantages PPO learns from.

Sampling and rewards are the fleets' work; log-probabilities and values are read by the trainer itself, with the weights
it starts the update from, so that the ratio begins at one.
"""

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from rayrl.algorithms import ppo
from rayrl.algorithms.batching import micro_batches
from rayrl.config import PpoConfig
from rayrl.data.batches import Row
from rayrl.data.collate import TokenBatch, collate
from rayrl.engines.generator import Continuation, Sampling
from rayrl.fleets.fleet import Fleet
from rayrl.models.actor_critic import ActorCritic, policy_logprobs
from rayrl.models.served_reward import ServedReward
from rayrl.records import Checkpoint, HeldOutAnswer, Scored, content_id
from rayrl.training import deepspeed_engine as zero


@dataclass(frozen=True, kw_only=True)
class Answers:
    """Responses of one version of the policy to prompts, with their rewards."""

    step: int
    """The update whose weights wrote them; 0 is M1."""
    prompts: list[Row]
    continuations: list[Continuation]
    rewards: list[float | None]
    generate_s: float
    reward_s: float


def sample(
    fleet: Fleet,
    policy: Checkpoint,
    prompts: list[Row],
    sampling: Sampling,
    rewards: ServedReward,
    step_and_seed: tuple[int, str],
) -> Answers:
    """One response to each prompt, and its reward. A response's random stream follows from the seed and its prompt.

    A reward that is no finite number abstains: it would spread over the whole rollout.
    """
    step, seed = step_and_seed
    if not prompts:
        return Answers(step=step, prompts=[], continuations=[], rewards=[], generate_s=0.0, reward_s=0.0)
    started = time.monotonic()
    seeds = [[response_seed(seed, row["id"])] for row in prompts]
    token_ids = [row["token_ids"] for row in prompts]
    sampled = fleet.map(
        len(prompts), lambda part: fleet.call("generate", policy, token_ids[part], seeds[part], sampling)
    )
    continuations = [continuation for (continuation,) in sampled]
    sampled_at = time.monotonic()
    items = [
        Scored(prompt=row["text"], response=said.text, token_ids=row["token_ids"] + said.token_ids)
        for row, said in zip(prompts, continuations, strict=True)
    ]
    return Answers(
        step=step,
        prompts=prompts,
        continuations=continuations,
        rewards=[r if r is not None and math.isfinite(r) else None for r in rewards.score(items)],
        generate_s=sampled_at - started,
        reward_s=time.monotonic() - sampled_at,
    )


def response_seed(seed: str, prompt_id: str) -> int:
    """The random stream of a prompt's response in one rollout, a function of the rollout's seed and the prompt."""
    return int(content_id("rollout", seed, prompt_id), 16) >> 1


def held_out_answers(answers: Answers) -> Iterator[HeldOutAnswer]:
    """The answers as rows of a table."""
    for prompt, said, reward in zip(answers.prompts, answers.continuations, answers.rewards, strict=True):
        yield HeldOutAnswer(
            prompt_id=prompt["id"],
            prompt=prompt["text"],
            prompt_token_ids=prompt["token_ids"],
            response=said.text,
            token_ids=said.token_ids,
            reward=reward,
        )


TENSORS = ("logprobs", "values", "advantages", "returns", "importance")
"""Of an `Experience`, what the losses read."""


@dataclass(frozen=True, kw_only=True)
class Experience:
    """N responses with what PPO needs of each token; (N, R) tensors padded on the right, on the CPU."""

    ids: list[str]
    """Of the prompts, for messages."""
    prompts: list[list[int]]
    responses: list[list[int]]
    mask: Tensor
    logprobs: Tensor
    values: Tensor
    advantages: Tensor
    returns: Tensor
    importance: Tensor
    """pi_old / pi_sampler, capped; 1 but for rounding when the sampler held the trainer's weights."""
    sums: dict[str, float]
    """Over this rank's responses: how many, their rewards, KL in nats, tokens, truncations, abstentions, and how many
    span two versions of the weights."""

    def __len__(self) -> int:
        return len(self.prompts)

    def micro_batches(self, indices: list[int], max_tokens: int) -> Iterator[tuple[TokenBatch, dict[str, Tensor]]]:
        """The chosen responses in batches of similar length, with their rows of the tensors."""
        lengths = [len(self.prompts[i]) + len(self.responses[i]) for i in indices]
        for batch in micro_batches(lengths, max_tokens):
            rows = [indices[i] for i in batch]
            tokens = collate([self.prompts[i] for i in rows], [self.responses[i] for i in rows])
            width = tokens.response_ids.shape[1]
            yield tokens, {name: getattr(self, name)[rows, :width] for name in TENSORS}


def experience(engine: Any, reference: Any, answers: Answers, config: PpoConfig, kl_coef: float) -> Experience:
    """Advantages of the answered prompts. Empty and unrewarded responses are left out.

    Args:
        engine: the DeepSpeed engine around `ActorCritic`.
        reference: the frozen M1, or None to read it from the policy without its adapters.
        answers: this rank's share of the rollout.
        config: estimator, discounts, scaling.
        kl_coef: reward taken per nat and token.
    """
    kept = [i for i, r in enumerate(answers.rewards) if r is not None and answers.continuations[i].token_ids]
    prompts = [answers.prompts[i]["token_ids"] for i in kept]
    said = [answers.continuations[i] for i in kept]
    old, values, under_reference = _read(engine, reference, prompts, said, config.micro_batch_tokens)
    sampler = _padded([torch.tensor(c.token_logprobs) for c in said])
    mask = _padded([torch.ones(len(c.token_ids)) for c in said]).bool()
    scores = torch.tensor([answers.rewards[i] for i in kept], dtype=torch.float32)
    finished = torch.tensor([c.finish_reason == "stop" for c in said], dtype=torch.bool)
    kl = ppo.kl_penalty(old, under_reference, config.kl_estimator)
    shaped = ppo.shaped_rewards(ppo.truncation_penalty(scores, finished, config.truncation_penalty), kl, mask, kl_coef)
    if config.scale_rewards:
        shaped = ppo.scale_to_unit_std(shaped, mask, zero.summed(ppo.masked_moments(shaped, mask), engine))
    advantages, returns = ppo.gae(shaped, values, mask, gamma=config.gamma, gae_lambda=config.gae_lambda)
    advantages = ppo.whiten(advantages, mask, zero.summed(ppo.masked_moments(advantages, mask), engine))
    return Experience(
        ids=[answers.prompts[i]["id"] for i in kept],
        prompts=prompts,
        responses=[c.token_ids for c in said],
        mask=mask,
        logprobs=old,
        values=values,
        advantages=advantages,
        returns=returns,
        importance=ppo.truncated_importance(old, sampler, config.importance_cap),
        sums={
            "num_responses": len(kept),
            "reward": scores.sum().item(),
            "kl": torch.where(mask, old - under_reference, 0.0).sum().item(),
            "length": mask.sum().item(),
            "truncated": float((~finished).sum()),
            "spanning": sum(len(c.versions) > 1 for c in said),
            "num_abstained": len(answers.rewards) - len(kept),
        },
    )


def _read(
    engine: Any, reference: Any, prompts: list[list[int]], said: list[Continuation], max_tokens: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Log pi, V and log pi_ref of every response token, (N, R) each."""
    actor_critic: ActorCritic = engine.module
    engine.eval()
    width = max((len(c.token_ids) for c in said), default=1)
    read = torch.zeros(3, len(said), width)
    batches = micro_batches([len(p) + len(c.token_ids) for p, c in zip(prompts, said, strict=True)], max_tokens)
    with torch.no_grad():
        for n in range(int(zero.largest(len(batches), engine))):
            rows = batches[n] if n < len(batches) else []
            tokens = collate([prompts[i] for i in rows] or [[0]], [said[i].token_ids for i in rows] or [[0]])
            tokens = tokens.to(engine.device)
            logprobs, values = engine(tokens)
            if reference is None:
                with actor_critic.policy.disable_adapter():
                    under_reference = policy_logprobs(actor_critic.policy, tokens)
            else:
                under_reference = policy_logprobs(reference, tokens)
            read[:, rows, : logprobs.shape[1]] = (
                torch.stack([logprobs, values, under_reference]).float().cpu()[:, : len(rows)]
            )
    engine.train()
    return read[0], read[1], read[2]


def _padded(rows: list[Tensor]) -> Tensor:
    return pad_sequence(rows, batch_first=True) if rows else torch.zeros(0, 1)
