import math

import jaxtyping
import pytest
import torch
from beartype import beartype

from rayrl.algorithms import preference

checked = jaxtyping.jaxtyped(typechecker=beartype)  # in tests, the shapes in the signatures are enforced
dpo_loss = checked(preference.dpo_loss)
bradley_terry_loss = checked(preference.bradley_terry_loss)
token_logprobs = checked(preference.token_logprobs)


def logps(seed, batch=6):
    return -20 * torch.rand(batch, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("label_smoothing", [0.0, 0.2])
def test_equal_ratios_cost_log_2(label_smoothing):
    losses, *rewards = dpo_loss(logps(0), logps(0), beta=0.3, label_smoothing=label_smoothing)
    assert losses.tolist() == pytest.approx([math.log(2)] * 6)
    torch.testing.assert_close(rewards, [0.3 * logps(0)] * 2)


def test_gradients_are_the_papers():
    """Gradient of Eq. 7: -beta sigma(r_rejected - r_chosen) on the chosen, and its negative on the rejected."""
    chosen, rejected = logps(0).requires_grad_(), logps(1).requires_grad_()
    losses, chosen_rewards, rejected_rewards = dpo_loss(chosen, rejected, beta=0.1)
    losses.sum().backward()
    expected = -0.1 * torch.sigmoid(rejected_rewards - chosen_rewards)
    torch.testing.assert_close(chosen.grad, expected)
    torch.testing.assert_close(rejected.grad, -expected)
    assert not chosen_rewards.requires_grad


def test_label_smoothing_mixes_in_the_swapped_pair():
    smoothed, *_ = dpo_loss(logps(0), logps(1), beta=0.1, label_smoothing=0.1)
    kept, *_ = dpo_loss(logps(0), logps(1), beta=0.1)
    swapped, *_ = dpo_loss(logps(1), logps(0), beta=0.1)
    torch.testing.assert_close(smoothed, 0.9 * kept + 0.1 * swapped)


@pytest.mark.parametrize("share", [0.0, 0.1, 0.3])
def test_the_robust_loss_of_flipped_labels_is_on_average_that_of_the_true_ones(share):
    """Which is what conservative DPO's is not (arXiv 2403.00409, section 4)."""
    true, *_ = dpo_loss(logps(0), logps(1), beta=0.1)
    kept, *_ = dpo_loss(logps(0), logps(1), beta=0.1, loss="robust", label_smoothing=share)
    flipped, *_ = dpo_loss(logps(1), logps(0), beta=0.1, loss="robust", label_smoothing=share)
    torch.testing.assert_close((1 - share) * kept + share * flipped, true)


def test_simpo_is_the_loss_of_mean_log_probabilities_with_a_margin():
    """-log sigma(beta / |y_w| log pi(y_w) - beta / |y_l| log pi(y_l) - gamma): arXiv 2405.14734, Eq. 6."""
    losses, *_ = dpo_loss(
        torch.tensor([-6.0]),
        torch.tensor([-12.0]),
        beta=2.0,
        margin=0.5,
        lengths=(torch.tensor([3]), torch.tensor([4])),
    )
    by_hand = -math.log(1 / (1 + math.exp(-(2.0 * (-6 / 3) - 2.0 * (-12 / 4) - 0.5))))
    assert losses.item() == pytest.approx(by_hand)


def test_desensitised_weights_by_hand():
    chosen, rejected = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]]), torch.tensor([[1, 1, 0, 0], [1, 1, 1, 0]])
    on_chosen, on_rejected = checked(preference.desensitised_weights)(chosen, rejected, 0.25)
    assert on_chosen.tolist() == [[1, 1, 0.25, 0.25], [1, 1, 0, 0]]
    assert on_rejected.tolist() == [[1, 1, 0, 0], [1, 1, 0.25, 0]]
    plain = preference.desensitised_weights(chosen, rejected, 1.0)
    assert [weights.tolist() for weights in plain] == [chosen.tolist(), rejected.tolist()]


def test_mean_nll_is_per_token_and_reads_no_padding():
    logprobs = torch.tensor([[-1.0, -3.0, -torch.inf], [-2.0, torch.nan, torch.nan], [0.0, 0.0, 0.0]])
    mask = torch.tensor([[1, 1, 0], [1, 0, 0], [0, 0, 0]])
    assert checked(preference.mean_nll)(logprobs, mask).tolist() == [2.0, 2.0, 0.0]


def test_on_policy_weights_are_at_most_one_and_carry_no_gradient():
    chosen = torch.tensor([-1.0, 2.0], requires_grad=True)
    weights = checked(preference.on_policy_weights)(chosen, torch.tensor([-0.5, 0.0]))
    assert weights.tolist() == pytest.approx([math.exp(-1.5), 1.0]) and not weights.requires_grad


@pytest.mark.parametrize(("log_ratio", "expected"), [(5.0, 0.0), (8.0, 9.0)])
def test_ipo_is_least_at_its_target_margin(log_ratio, expected):
    losses, *_ = dpo_loss(torch.tensor([log_ratio]), torch.zeros(1), beta=0.1, loss="ipo")
    assert losses.item() == pytest.approx(expected)


def test_an_added_loss_is_found_by_its_name_and_changes_no_other(monkeypatch):
    """The hinge loss of SLiC-HF (arXiv 2305.10425)."""
    settings = {"beta": 0.1, "label_smoothing": 0.1}
    before = {name: dpo_loss(logps(0), logps(1), loss=name, **settings) for name in preference.PREFERENCE_LOSSES}

    def hinge_loss(difference, *, beta, label_smoothing):
        return torch.relu(1 - beta * difference)

    monkeypatch.setitem(preference.PREFERENCE_LOSSES, "hinge", hinge_loss)
    losses, *rewards = dpo_loss(logps(0), logps(1), loss="hinge", **settings)
    torch.testing.assert_close(losses, torch.relu(1 - 0.1 * (logps(0) - logps(1))))
    for name, (unchanged, *same_rewards) in before.items():
        assert torch.equal(dpo_loss(logps(0), logps(1), loss=name, **settings)[0], unchanged)
        assert all(map(torch.equal, rewards, same_rewards))


def test_lengths_average_the_log_ratios_and_leave_the_rewards():
    lengths = torch.arange(1, 7), torch.arange(6, 0, -1)
    losses, rewards, _ = dpo_loss(logps(0), logps(1), beta=0.5, lengths=lengths)
    by_hand, *_ = dpo_loss(logps(0) / lengths[0], logps(1) / lengths[1], beta=0.5)
    torch.testing.assert_close(losses, by_hand)
    torch.testing.assert_close(rewards, 0.5 * logps(0))


def test_bradley_terry():
    chosen, rejected = logps(0).requires_grad_(), logps(1)
    losses = bradley_terry_loss(chosen, rejected)
    probability = torch.sigmoid(chosen - rejected)
    torch.testing.assert_close(losses, -probability.log())
    losses.sum().backward()
    torch.testing.assert_close(chosen.grad, (probability - 1).detach())
    assert bradley_terry_loss(torch.tensor([300.0]), torch.tensor([-300.0])).item() == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_token_logprobs_are_log_softmaxs(dtype):
    generator = torch.Generator().manual_seed(0)
    logits = (5 * torch.randn(3, 4, 11, generator=generator)).to(dtype)
    token_ids = torch.randint(11, (3, 4), generator=generator)
    expected = logits.float().log_softmax(-1).gather(-1, token_ids[..., None]).squeeze(-1)
    torch.testing.assert_close(token_logprobs(logits, token_ids), expected)
    torch.testing.assert_close(token_logprobs(logits[0], token_ids[0]), expected[0])


def test_the_gradient_of_token_logprobs_is_autograds():
    generator = torch.Generator().manual_seed(0)
    logits = (5 * torch.randn(3, 4, 11, generator=generator)).requires_grad_()
    token_ids = torch.randint(11, (3, 4), generator=generator)
    weights = torch.randn(3, 4, generator=generator)
    by_definition = logits.log_softmax(-1).gather(-1, token_ids[..., None]).squeeze(-1)
    (expected,) = torch.autograd.grad((weights * by_definition).sum(), logits)
    (found,) = torch.autograd.grad((weights * token_logprobs(logits, token_ids)).sum(), logits)
    torch.testing.assert_close(found, expected)


def test_wrong_shapes_are_refused_in_tests():
    with pytest.raises(jaxtyping.TypeCheckError):
        dpo_loss(logps(0), logps(1, batch=5), beta=0.1)
