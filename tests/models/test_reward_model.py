"""The scalar evaluator's pooling and head."""

import torch

from rayrl.data.collate import collate
from rayrl.models.reward_model import RewardModel, pool

HIDDEN = torch.arange(21, dtype=torch.float32).reshape(7, 3)  # of sequences of 2, 1 and 4 tokens
LENGTHS = (2, 1, 4)


def test_mean_pooling_is_per_sequence():
    expected = torch.stack([HIDDEN[:2].mean(0), HIDDEN[2], HIDDEN[3:].mean(0)])
    torch.testing.assert_close(pool(HIDDEN, LENGTHS, "mean"), expected)


def test_last_pooling_takes_each_sequences_last_token():
    torch.testing.assert_close(pool(HIDDEN, LENGTHS, "last"), HIDDEN[[1, 2, 6]])


def forward(model, batch):
    with torch.no_grad():
        return model(batch)


def test_before_training_everything_is_worth_nothing(tiny_policy):
    model = RewardModel(tiny_policy.load(), "mean")
    assert forward(model, collate([[1, 5, 6], [1]], [[7], [8, 9]])).tolist() == [0.0, 0.0]


def test_rewards_do_not_depend_on_the_batch(tiny_policy):
    for pooling in ("mean", "last"):
        model = RewardModel(tiny_policy.load(), pooling)
        torch.manual_seed(0)
        torch.nn.init.normal_(model.head.weight)
        prompts, responses = [[1, 5, 6, 10, 11], [1]], [[7], [8, 9, 12]]
        together = forward(model, collate(prompts, responses))
        alone = [forward(model, collate([p], [r])) for p, r in zip(prompts, responses, strict=True)]
        torch.testing.assert_close(together, torch.cat(alone), atol=1e-4, rtol=1e-4)
        assert abs(together[0] - together[1]) > 0.01
