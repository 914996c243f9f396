import math

import jaxtyping
import pytest
import torch
from beartype import beartype
from torch.distributions import Independent, Normal, kl_divergence

from rayrl.algorithms import information
from rayrl.algorithms.information import Gaussian
from rayrl.models.view_networks import Critic

checked = jaxtyping.jaxtyped(typechecker=beartype)
jensen_shannon_mi = checked(information.jensen_shannon_mi)
mi_nats = checked(information.mi_nats)
rolled = checked(information.rolled)
score_pairs = checked(information.score_pairs)
symmetric_kl = checked(information.symmetric_kl)
gaussian_sample = checked(information.gaussian_sample)
info_nce = checked(information.info_nce)
uml_loss = checked(information.uml_loss)
kl_to_standard_normal = checked(information.kl_to_standard_normal)
bottleneck_losses = checked(information.bottleneck_losses)


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def code(seed, batch=6, z_dim=4):
    generator = rng(seed)
    mu = torch.randn(batch, z_dim, generator=generator)
    return Gaussian(mu=mu, sigma=0.2 + torch.rand(batch, z_dim, generator=generator))


def two_bits():
    """Equal with probability 0.8, as samples in exact proportion: scores T* of the joint and of the product."""
    log_ratio = {True: math.log(0.4 / 0.25), False: math.log(0.1 / 0.25)}
    joint = torch.tensor([log_ratio[equal] for equal in [True] * 8 + [False] * 2], dtype=torch.float64)
    product = torch.tensor([log_ratio[equal] for equal in [True, False]], dtype=torch.float64)
    return joint, product


def test_the_best_critic_meets_the_jensen_shannon_divergence():
    joint, product = two_bits()
    p, q = torch.tensor([0.4, 0.1, 0.1, 0.4]), torch.tensor([0.25] * 4)
    middle = (p + q) / 2
    divergence = ((p * (p / middle).log()).sum() + (q * (q / middle).log()).sum()) / 2
    assert jensen_shannon_mi(joint, product).item() == pytest.approx(2 * divergence.item() - 2 * math.log(2), abs=1e-6)
    for scale, shift in ((0.5, 0.0), (2.0, 0.0), (1.0, 0.3)):
        worse = jensen_shannon_mi(scale * joint + shift, scale * product + shift)
        assert worse < jensen_shannon_mi(joint, product) - 1e-3


def test_the_best_critic_reads_mutual_information_in_nats():
    joint, product = two_bits()
    expected = math.log(2) + 0.8 * math.log(0.8) + 0.2 * math.log(0.2)
    assert mi_nats(joint, product).item() == pytest.approx(expected, abs=1e-12)
    for scale, shift in ((0.5, 0.0), (2.0, 0.0), (1.0, 0.3), (1.0, -0.3)):
        assert mi_nats(scale * joint + shift, scale * product + shift) < expected


def test_a_critic_that_knows_nothing():
    assert jensen_shannon_mi(torch.zeros(3), torch.zeros(5)).item() == pytest.approx(-2 * math.log(2))
    assert mi_nats(torch.zeros(3), torch.zeros(5)).item() == 0


def test_extreme_scores_stay_finite():
    assert jensen_shannon_mi(torch.tensor([1e4]), torch.tensor([-1e4])).item() == 0
    assert jensen_shannon_mi(torch.tensor([-1e4]), torch.tensor([1e4])).item() == -2e4


def correlated(rho, num, generator):
    """(x, y) of two independent coordinates, each bivariate normal with correlation rho: I = -log(1 - rho^2) nats."""
    x, noise = torch.randn(num, 2, generator=generator), torch.randn(num, 2, generator=generator)
    return x, rho * x + math.sqrt(1 - rho**2) * noise


def log_ratio(rho, x, y):
    """T* = log p(x, y) / (p(x) p(y)) of `correlated`."""
    squared = 1 - rho**2
    return (rho * (2 * x * y - rho * (x.square() + y.square())) / (2 * squared) - math.log(squared) / 2).sum(-1)


@pytest.mark.parametrize("rho", [0.0, 0.5, 0.8])
def test_rolling_gives_the_product_of_the_marginals(rho):
    """The exact critic reads the Gaussians' information from 200,000 samples, to sampling noise (0.02 nats)."""
    x, y = correlated(rho, 200_000, rng())
    joint, product = score_pairs(lambda a, b: log_ratio(rho, a, b), x, y)
    assert mi_nats(joint, product).item() == pytest.approx(-math.log(1 - rho**2), abs=0.02)


@pytest.mark.parametrize("rho", [0.0, 0.8])
def test_a_trained_critic_estimates_mutual_information(rho):
    """1500 steps of a small critic, read on fresh samples: within 0.05 nats of 0 and of 1.02.

    What remains is mostly the critic's own error, and reads low.
    """
    torch.manual_seed(0)
    critic, generator = Critic(2, 2, hidden_dim=64), rng(1)
    optimizer = torch.optim.Adam(critic.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 1500)
    for _ in range(1500):
        loss = -jensen_shannon_mi(*score_pairs(critic, *correlated(rho, 512, generator)))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        estimate = mi_nats(*score_pairs(critic, *correlated(rho, 50_000, generator))).item()
    assert estimate == pytest.approx(-math.log(1 - rho**2), abs=0.05)


def test_rolled_pairs_each_row_with_its_neighbour():
    rows = torch.arange(6.0).reshape(3, 2)
    assert rolled(rows).tolist() == [[4, 5], [0, 1], [2, 3]]
    joint, product = score_pairs(lambda a, b: 10 * a[:, 0] + b[:, 0], rows, rows)
    assert joint.tolist() == [0, 22, 44]
    assert product.tolist() == [40, 2, 24]


def test_symmetric_kl_is_torchs():
    (mu1, sigma1), (mu2, sigma2) = code(0), code(1)
    p, q = Independent(Normal(mu1, sigma1), 1), Independent(Normal(mu2, sigma2), 1)
    expected = (kl_divergence(p, q) + kl_divergence(q, p)) / 2
    torch.testing.assert_close(symmetric_kl(mu1, sigma1, mu2, sigma2), expected, atol=1e-5, rtol=1e-5)


def test_symmetric_kl_is_what_sampling_estimates():
    """The one-sample estimate of the multi-view bottleneck's release, averaged over a million samples."""
    first, second = (Gaussian(mu=c.mu.double(), sigma=c.sigma.double()) for c in (code(0, 1), code(1, 1)))
    p, q = (Independent(Normal(c.mu.squeeze(0), c.sigma.squeeze(0)), 1) for c in (first, second))
    x, y = (
        gaussian_sample(c.mu.expand(1_000_000, -1), c.sigma.expand(1_000_000, -1), rng(i))
        for i, c in enumerate((first, second))
    )
    samples = (p.log_prob(x) - q.log_prob(x) + q.log_prob(y) - p.log_prob(y)) / 2
    tolerance = 4 * samples.std().item() / 1000
    exact = symmetric_kl(*first, *second).item()
    assert tolerance < 0.02 * exact
    assert samples.mean().item() == pytest.approx(exact, abs=tolerance)


def test_symmetric_kl_is_symmetric_and_zero_only_at_equality():
    first, second = code(0), code(1)
    torch.testing.assert_close(symmetric_kl(*first, *second), symmetric_kl(*second, *first))
    assert not symmetric_kl(*first, *first).any()
    nearly = Gaussian(mu=first.mu, sigma=first.sigma * (1 + 1e-6))
    assert (symmetric_kl(*first, *nearly) >= 0).all()
    assert (symmetric_kl(*first, *second) > 0).all()


def test_samples_are_seeded_gaussian_and_differentiable():
    mu, sigma = torch.full((50_000, 2), 3.0), torch.tensor([0.5, 2.0]).expand(50_000, 2)
    drawn = gaussian_sample(mu, sigma, rng())
    assert torch.equal(drawn, gaussian_sample(mu, sigma, rng()))
    assert not torch.equal(drawn, gaussian_sample(mu, sigma, rng(1)))
    torch.testing.assert_close(drawn.mean(0), torch.tensor([3.0, 3.0]), atol=0.05, rtol=0)
    torch.testing.assert_close(drawn.std(0), torch.tensor([0.5, 2.0]), atol=0, rtol=0.02)
    mu, sigma = torch.zeros(1, 3, requires_grad=True), torch.ones(1, 3, requires_grad=True)
    noise = gaussian_sample(mu, sigma, rng())
    noise.sum().backward()
    assert mu.grad.tolist() == [[1, 1, 1]]
    torch.testing.assert_close(sigma.grad, noise.detach())


def test_info_nce_at_its_extremes():
    """Alike rows: log 8. Row i alike its partner and orthogonal to the rest: nothing left to find."""
    assert info_nce(torch.ones(8, 3), torch.ones(8, 3)).item() == pytest.approx(math.log(8))
    found = info_nce(torch.eye(8), 5 * torch.eye(8), 0.5).item()
    assert found == pytest.approx(math.log(1 + 7 * math.exp(-2)), abs=1e-6)
    assert info_nce(torch.eye(8), torch.eye(8)).item() < 1e-3
    assert info_nce(torch.eye(8), torch.eye(8).roll(1, 0)).item() > 9


def test_info_nce_averages_both_directions():
    z1, z2 = torch.randn(5, 3, generator=rng()), torch.randn(5, 3, generator=rng(1))
    assert info_nce(z1, z2).item() == pytest.approx(info_nce(z2, z1).item(), abs=1e-6)
    similarity = torch.nn.functional.cosine_similarity(z1[:, None], z2[None], dim=-1) / 0.1
    forward = -similarity.log_softmax(1).diag().mean()
    backward = -similarity.log_softmax(0).diag().mean()
    assert abs(forward - backward) > 0.01
    torch.testing.assert_close(info_nce(z1, z2), (forward + backward) / 2)


def dot(a, b):
    """A critic for any two widths."""
    width = min(a.shape[1], b.shape[1])
    return (a[:, :width] * b[:, :width]).sum(-1)


def losses(objective, views=None, score=dot, **settings):
    views = views or (torch.randn(6, 3, generator=rng(5)), torch.randn(6, 3, generator=rng(6)))
    return uml_loss(views, (code(0), code(1)), score, objective=objective, generator=rng(2), **settings)


def samples():
    generator = rng(2)
    return gaussian_sample(*code(0), generator), gaussian_sample(*code(1), generator)


def test_uml_is_mvi_plus_the_divergence():
    scores = score_pairs(dot, *samples())
    mvi, uml, weighted = losses("mvi"), losses("uml"), losses("uml", skl_weight=0.25)
    skl = symmetric_kl(*code(0), *code(1)).mean()
    torch.testing.assert_close(mvi.loss, -jensen_shannon_mi(*scores))
    torch.testing.assert_close(uml.loss, mvi.loss + skl)
    torch.testing.assert_close(weighted.loss, mvi.loss + 0.25 * skl)
    for made in (mvi, uml):
        torch.testing.assert_close(made.mi, mi_nats(*scores))
        torch.testing.assert_close(made.skl, skl)


def test_infomax_joins_each_view_with_its_own_code():
    views = torch.randn(6, 3, generator=rng(5)), torch.randn(6, 3, generator=rng(6))
    scores = [score_pairs(dot, view, z) for view, z in zip(views, samples(), strict=True)]
    made = losses("infomax", views)
    torch.testing.assert_close(made.loss, -(jensen_shannon_mi(*scores[0]) + jensen_shannon_mi(*scores[1])) / 2)
    torch.testing.assert_close(made.mi, (mi_nats(*scores[0]) + mi_nats(*scores[1])) / 2)


def test_contrastive_asks_no_critic():
    made = losses("contrastive", score=refuse)
    torch.testing.assert_close(made.loss, info_nce(*samples()))
    torch.testing.assert_close(made.mi, math.log(6) - made.loss)


def test_an_added_objective_is_found_by_its_name(monkeypatch):
    before = losses("uml")
    divergence_only = information.Objective(compute=lambda batch: (batch.skl, torch.zeros(())))
    monkeypatch.setitem(information.UML_OBJECTIVES, "skl", divergence_only)
    made = losses("skl", score=refuse)
    assert (made.loss, made.mi) == (made.skl, 0)
    assert torch.equal(losses("uml").loss, before.loss)


def test_only_infomax_lets_the_critic_see_the_views():
    views, codes = (torch.ones(6, 3), torch.ones(6, 3)), (code(0), code(1))
    for name, objective in information.UML_OBJECTIVES.items():
        widths = set()

        def critic(a, b, widths=widths):
            widths.add((a.shape[1], b.shape[1]))
            return dot(a, b)

        uml_loss(views, codes, critic, objective=name, generator=rng())
        assert widths <= ({(3, 4)} if objective.scores_views else {(4, 4)})
        assert (name == "infomax") == objective.scores_views


def refuse(a, b):
    raise AssertionError("the contrastive loss has no critic")


@pytest.mark.parametrize("objective", ["uml", "mvi", "infomax", "contrastive"])
def test_only_the_loss_carries_gradients(objective):
    codes = code(0), code(1)
    for tensor in (*codes[0], *codes[1]):
        tensor.requires_grad_()
    made = uml_loss((torch.ones(6, 3), torch.ones(6, 3)), codes, dot, objective=objective, generator=rng())
    assert (made.loss.requires_grad, made.mi.requires_grad, made.skl.requires_grad) == (True, False, False)


@pytest.mark.parametrize("objective", ["uml", "mvi", "infomax", "contrastive"])
def test_one_prompt_has_no_negatives(objective):
    views, codes = (torch.ones(1, 3), torch.ones(1, 3)), (code(0, 1), code(1, 1))
    with pytest.raises(ValueError, match="at least 2 prompts, got 1"):
        uml_loss(views, codes, dot, objective=objective)
    with pytest.raises(ValueError, match="at least 2"):
        rolled(torch.ones(1, 3))


def test_divergence_from_the_prior_is_that_of_torch():
    mu, sigma = code(3)
    expected = kl_divergence(Independent(Normal(mu, sigma), 1), Independent(Normal(0 * mu, torch.ones_like(mu)), 1))
    torch.testing.assert_close(kl_to_standard_normal(mu, sigma), expected)
    assert kl_to_standard_normal(torch.zeros(2, 3), torch.ones(2, 3)).tolist() == [0, 0]


def test_a_bottleneck_pays_for_the_codes_of_both_responses():
    chosen, rejected = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 0.0])
    prior = Gaussian(mu=torch.zeros(2, 3), sigma=torch.ones(2, 3))
    moved = Gaussian(mu=torch.tensor([[2.0, 0, 0], [0, 0, 0]]), sigma=torch.ones(2, 3))  # 2 nats, and none
    free = [math.log1p(math.exp(-1)), math.log(2)]
    assert bottleneck_losses(chosen, rejected, (prior, prior), beta=0.5).tolist() == pytest.approx(free)
    assert bottleneck_losses(chosen, rejected, (moved, prior), beta=0.5).tolist() == pytest.approx(
        [free[0] + 1, free[1]]
    )
    assert bottleneck_losses(chosen, rejected, (moved, moved), beta=0.5).tolist() == pytest.approx(
        [free[0] + 2, free[1]]
    )
