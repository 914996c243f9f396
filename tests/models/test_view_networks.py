"""The code encoder and the critic."""

import pytest
import torch
from torch import nn

from rayrl.algorithms.information import uml_loss
from rayrl.models.view_networks import Critic, GaussianEncoder


def test_codes_are_float32_gaussians_with_positive_deviations():
    torch.manual_seed(0)
    encoder = GaussianEncoder(12)
    for dtype in (torch.float32, torch.bfloat16):
        code = encoder(100 * torch.randn(5, 12).to(dtype))
        assert code.mu.shape == code.sigma.shape == (5, 64)
        assert code.mu.dtype == code.sigma.dtype == torch.float32
        assert (code.sigma > 0).all()


def test_a_vanishing_deviation_stays_positive():
    encoder = GaussianEncoder(3, z_dim=2, hidden_dim=4)
    nn.init.zeros_(encoder.sigma[-1].weight)
    nn.init.constant_(encoder.sigma[-1].bias, -1000.0)
    assert encoder(torch.zeros(1, 3)).sigma.tolist() == [pytest.approx([1e-7, 1e-7])]


@pytest.mark.parametrize("network", [GaussianEncoder(6, hidden_dim=8).mu, Critic(2, 4, hidden_dim=8).net])
def test_networks_have_three_layers_of_the_stated_width(network):
    widths = [(layer.in_features, layer.out_features) for layer in network if isinstance(layer, nn.Linear)]
    assert widths[:2] == [(6, 8), (8, 8)]
    assert len(widths) == 3


def test_mu_and_sigma_share_no_weights():
    encoder = GaussianEncoder(3, z_dim=2, hidden_dim=4)
    encoder(torch.ones(1, 3)).mu.sum().backward()
    assert all(p.grad is not None for p in encoder.mu.parameters())
    assert all(p.grad is None for p in encoder.sigma.parameters())


def test_a_score_depends_on_both_sides_and_on_its_row_only():
    torch.manual_seed(0)
    critic, a, b = Critic(3, 5, hidden_dim=16), torch.randn(4, 3), torch.randn(4, 5)
    scores = critic(a, b)
    assert scores.shape == (4,)
    torch.testing.assert_close(critic(a[2:3], b[2:3]), scores[2:3])
    assert (critic(a + 1, b) != scores).all()
    assert (critic(a, b + 1) != scores).all()


@pytest.mark.parametrize("objective", ["uml", "mvi", "infomax", "contrastive"])
def test_every_objective_teaches_the_encoder_and_the_backbone(objective):
    torch.manual_seed(0)
    views = torch.randn(4, 6, requires_grad=True), torch.randn(4, 6, requires_grad=True)
    encoder = GaussianEncoder(6, z_dim=3, hidden_dim=16)
    critic = Critic(6 if objective == "infomax" else 3, 3, hidden_dim=16)
    codes = encoder(views[0]), encoder(views[1])
    uml_loss(views, codes, critic, objective=objective).loss.backward()
    learning = [*views, *encoder.parameters(), *([] if objective == "contrastive" else critic.parameters())]
    assert all(t.grad is not None and t.grad.isfinite().all() and t.grad.any() for t in learning)
