"""The scalar evaluator's pooling and head."""

import torch

from rayrl.data.collate import collate
from rayrl.models.reward_model import RewardModel, pool

HIDDEN = torch.arange(24, dtype=torch.float32).reshape(2, 4, 3)
MASK = torch.tensor([[0, 1, 1, 0], [1, 1, 1, 1]])


def test_mean_pooling_leaves_padding_out():
    expected = torch.stack([HIDDEN[0, 1:3].mean(0), HIDDEN[1].mean(0)])
    torch.testing.assert_close(pool(HIDDEN, MASK, "mean"), expected)


def test_last_pooling_takes_the_last_real_token():
    torch.testing.assert_close(pool(HIDDEN, MASK, "last"), torch.stack([HIDDEN[0, 2], HIDDEN[1, 3]]))


def test_last_pooling_of_a_single_first_token():
    torch.testing.assert_close(pool(HIDDEN[:1], torch.tensor([[1, 0, 0, 0]]), "last"), HIDDEN[:1, 0])


def forward(model, batch):
    with torch.no_grad():
        return model(batch.input_ids, batch.attention_mask, batch.position_ids)


def test_before_training_everything_is_worth_nothing(tiny_policy):
    model = RewardModel(tiny_policy.load(), "mean")
    assert forward(model, collate([[1, 5, 6], [1]], [[7], [8, 9]])).tolist() == [0.0, 0.0]


def test_rewards_do_not_depend_on_padding(tiny_policy):
    for pooling in ("mean", "last"):
        model = RewardModel(tiny_policy.load(), pooling)
        torch.manual_seed(0)
        torch.nn.init.normal_(model.head.weight)
        prompts, responses = [[1, 5, 6, 10, 11], [1]], [[7], [8, 9, 12]]
        together = forward(model, collate(prompts, responses))
        alone = [forward(model, collate([p], [r])) for p, r in zip(prompts, responses, strict=True)]
        torch.testing.assert_close(together, torch.cat(alone), atol=1e-4, rtol=1e-4)
        assert abs(together[0] - together[1]) > 0.01
