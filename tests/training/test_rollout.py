"""Rollouts in one process: several responses to a prompt, and the advantages that are made of their rewards."""

import pytest
import torch
from torch import nn

from rayrl.algorithms.advantages import group_mean, group_normalised, rloo
from rayrl.config import PpoConfig
from rayrl.engines.generator import Continuation, Sampling
from rayrl.models.actor_critic import Actor, ActorCritic
from rayrl.models.policy import TokenLogprobs
from rayrl.records import Checkpoint, drawn_seed
from rayrl.training.rollout import Rollout, evaluate_rollout, group_numbers, on_device, response_seeds, sample

KL_COEF = 0.5
PROMPTS = [{"id": f"p{n}", "text": f"prompt {n}", "token_ids": [1, 20 + n]} for n in range(3)]
RESPONSES = [[5, 6, 2], [7, 2], [8, 9, 10, 2], [11, 2], [12, 13, 2], [14, 2], [15, 2], [16, 17, 2], [18, 2]]
REWARDS = [1.0, None, 3.0, 2.0, 2.0, 5.0, None, 4.0, None]
"""Of p0 two rewards, of p1 three, of p2 one, with which nothing can be compared."""


class EchoFleet:
    """Answers a prompt with its seeds."""

    def map(self, num_rows, function):
        return [*function(slice(0, 1)), *function(slice(1, num_rows))]

    def call(self, method, checkpoint, token_ids, seeds, sampling):
        assert method == "generate"
        return [[said([seed % 97, 2]) for seed in of_prompt] for of_prompt in seeds]


class Lengths:
    def score(self, items, reasons=None):
        return [float(item.token_ids[-2]) for item in items]


class Alone:
    """An engine around a module on one rank."""

    def __init__(self, module):
        self.module, self.device = module, torch.device("cpu")

    def __call__(self, tokens):
        return self.module(tokens)

    def eval(self):
        self.module.eval()

    def train(self):
        self.module.train()


def said(token_ids):
    logprobs = [-1.0] * len(token_ids)
    return Continuation(
        text="",
        token_ids=token_ids,
        logprob=sum(logprobs),
        token_logprobs=logprobs,
        finish_reason="stop",
        candidates=[],
        versions=["v"],
    )


@pytest.fixture(scope="module")
def networks(tiny_policy):
    """A policy, and a reference that differs from it."""
    policy, reference = tiny_policy.load(), tiny_policy.load()
    with torch.no_grad():
        reference.lm_head.weight.mul_(1.01)
    return policy, reference


def evaluated(networks, rewards=REWARDS, **settings):
    config = PpoConfig(**{"k": 3, "rollout_size": 3, "batch_size": 9, "scale_rewards": False} | settings)
    policy, reference = networks
    model = ActorCritic(policy, policy) if config.trains_value else Actor(policy)
    rollout = Rollout(
        step=0,
        prompts=[prompt for prompt in PROMPTS for _ in range(3)],
        continuations=[said(response) for response in RESPONSES],
        rewards=rewards,
        generate_s=0.0,
        reward_s=0.0,
    )
    return evaluate_rollout(Alone(model), TokenLogprobs(reference), rollout, config, KL_COEF)


def test_k_responses_to_each_prompt_are_scored_one_by_one():
    m1 = Checkpoint(path="m1", version="m1")
    rollout = sample(
        EchoFleet(), m1, PROMPTS, Sampling(temperature=1.0, max_tokens=2), Lengths(), step=4, seed="s", k=3
    )
    assert [prompt["id"] for prompt in rollout.prompts] == ["p0"] * 3 + ["p1"] * 3 + ["p2"] * 3
    seeds = [seed for prompt in PROMPTS for seed in response_seeds("s", prompt["id"], 3)]
    assert len(set(seeds)) == 9
    assert [answer.token_ids[0] for answer in rollout.continuations] == [seed % 97 for seed in seeds]
    assert rollout.rewards == [float(seed % 97) for seed in seeds]


def test_the_first_response_does_not_depend_on_how_many_there_are():
    assert response_seeds("s", "p", 1) == response_seeds("s", "p", 4)[:1] == [drawn_seed("rollout", "s", "p")]


def test_groups_are_numbered_in_the_order_of_their_first_response():
    assert group_numbers(["b", "a", "b", "c"]).tolist() == [0, 1, 0, 2]
    assert group_numbers([]).dtype == torch.int64


@pytest.mark.parametrize(
    ("name", "estimate"), [("rloo", rloo), ("group_mean", group_mean), ("group_normalised", group_normalised)]
)
def test_responses_are_compared_by_their_score_less_the_kl_of_all_their_tokens(networks, name, estimate):
    experience = evaluated(networks, advantages=name)
    assert experience.ids == ["p0", "p0", "p1", "p1", "p1"]
    assert experience.responses == [RESPONSES[n] for n in (0, 2, 3, 4, 5)]
    targets, mask = experience.targets, torch.zeros(5, 4)
    for row, response in enumerate(experience.responses):
        mask[row, : len(response)] = 1
    kl = kl_by_response(networks, experience)
    assert kl.abs().min() > 1e-4, "the reference is another model"
    returns = torch.tensor([1.0, 3.0, 2.0, 2.0, 5.0]) - KL_COEF * kl
    expected = estimate(returns, torch.tensor([0, 0, 1, 1, 1])).unsqueeze(1) * mask
    torch.testing.assert_close(targets.advantages, expected, atol=1e-4, rtol=1e-4)
    assert targets.values is None and targets.returns is None
    assert targets.rows([1], 2).values is None
    assert (experience.sums["num_abstained"], experience.sums["num_alone"]) == (3, 1)
    assert experience.sums["reward"] == 13.0


def kl_by_response(networks, experience):
    """log pi - log pi_ref of each whole response, one at a time."""
    found = []
    with torch.no_grad():
        for prompt, response in zip(experience.prompts, experience.responses, strict=True):
            logprobs = [model(torch.tensor([prompt + response])).logits[0].log_softmax(-1) for model in networks]
            places = torch.arange(len(prompt) - 1, len(prompt) + len(response) - 1), torch.tensor(response)
            found.append((logprobs[0][places] - logprobs[1][places]).sum())
    return torch.stack(found)


def test_with_a_value_function_a_response_needs_no_other_one(networks):
    experience = evaluated(networks)
    assert experience.ids == ["p0", "p0", "p1", "p1", "p1", "p2"]
    assert "num_alone" not in experience.sums and experience.sums["num_abstained"] == 3
    assert experience.targets.values is not None and experience.targets.returns is not None


def test_no_reward_at_all_leaves_nothing_to_learn_from(networks):
    for settings in ({}, {"advantages": "rloo", "center_rewards": True, "scale_rewards": True}):
        assert len(evaluated(networks, rewards=[None] * 9, **settings)) == 0


def test_scaled_returns_have_the_deviation_1_of_the_rollout(networks):
    settings = {"advantages": "rloo", "k": 3}
    plain, scaled = (evaluated(networks, **settings, scale_rewards=scale) for scale in (False, True))
    returns = torch.tensor([1.0, 3.0, 2.0, 2.0, 5.0]) - KL_COEF * kl_by_response(networks, plain)
    expected = plain.targets.advantages / returns.std(correction=0)
    torch.testing.assert_close(scaled.targets.advantages, expected, atol=1e-4, rtol=1e-4)


def test_rewards_are_centred_and_clipped_before_the_kl_penalty_and_shown_as_they_were(networks):
    """The mean of 1, 3, 2, 2, 5 and 4 is 17 / 6; further than 1.5 from it are 1 and 5."""
    plain = evaluated(networks, gamma=1.0)
    bounded = evaluated(networks, center_rewards=True, reward_clip=1.5)
    mean = 17 / 6
    scores = torch.tensor([1.0, 3.0, 2.0, 2.0, 5.0, 4.0])
    moved = (scores - mean).clamp(-1.5, 1.5) - scores
    # the value is 0 everywhere, so that a return is what is still to come: the score is a part of all of them
    assert plain.targets.returns is not None and bounded.targets.returns is not None
    for row, response in enumerate(plain.responses):
        difference = (bounded.targets.returns - plain.targets.returns)[row, : len(response)]
        torch.testing.assert_close(difference, moved[row].expand(len(response)), atol=1e-5, rtol=1e-5)
    assert bounded.sums["reward"] == plain.sums["reward"] == 17.0
    assert bounded.sums["reward_clipped"] == 2 and "reward_clipped" not in plain.sums


def test_a_model_that_is_kept_elsewhere_comes_to_the_device_and_goes_back():
    class Recorded(nn.Linear):
        def to(self, device):
            moves.append(str(device))

    moves: list[str] = []
    with pytest.raises(RuntimeError), on_device(Recorded(1, 1), torch.device("meta")):
        assert moves == ["meta"]
        raise RuntimeError
    assert moves == ["meta", "cpu"]
