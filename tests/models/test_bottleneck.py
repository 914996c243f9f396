"""Head with an information bottleneck: what it draws, and what is left of it after the training."""

import torch

from rayrl.data.collate import collate
from rayrl.models.bottleneck import BottleneckHead, linear_head
from rayrl.models.reward_model import RewardModel
from rayrl.models.scalar_head import Float32Linear


def drawn_head(hidden_size=6, z_dim=3):
    torch.manual_seed(0)
    head = BottleneckHead(hidden_size, z_dim)
    for layer in (head.log_variance, head.decoder):
        torch.nn.init.normal_(layer.weight, std=0.3)
        torch.nn.init.normal_(layer.bias, std=0.3)
    return head


def test_the_exported_head_gives_the_reward_of_the_mean():
    head, states = drawn_head(), torch.randn(5, 6)
    linear = Float32Linear(6, 1)
    linear.load_state_dict(linear_head(head.state_dict()))
    with torch.no_grad():
        torch.testing.assert_close(linear(states), head(states))


def test_samples_vary_about_the_mean_as_the_code_does():
    head, states = drawn_head(), torch.randn(2, 6)
    with torch.no_grad():
        many, code = head.sampled(states.repeat_interleave(20_000, 0), torch.Generator().manual_seed(1))
        rewards = many.reshape(2, -1)
        torch.testing.assert_close(rewards.mean(1), head(states).squeeze(1), atol=0.03, rtol=0)
        spread = (code.sigma[::20_000] * head.decoder.weight).square().sum(1).sqrt()
        torch.testing.assert_close(rewards.std(1), spread, atol=0.03, rtol=0)


def test_a_bottleneck_is_worth_nothing_before_training_and_draws_by_its_seed(tiny_policy):
    torch.manual_seed(0)
    model = RewardModel(tiny_policy.load(), "last", z_dim=4)
    batch = collate([[1, 5, 6], [1]], [[7], [8, 9]])
    with torch.no_grad():
        assert model(batch).tolist() == [0.0, 0.0]
        torch.nn.init.normal_(model.head.decoder.weight)
        first, code = model.sampled(batch, seed=1)
        again, _ = model.sampled(batch, seed=1)
        other, _ = model.sampled(batch, seed=2)
    assert first.tolist() == again.tolist() != other.tolist()
    assert code.sigma.tolist() == [[1.0] * 4] * 2  # the prior's
