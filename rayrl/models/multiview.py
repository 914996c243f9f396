"""Reward model in training, as one module under one engine: with the codes of a bottleneck, and a branch for views."""

import torch
from torch import Tensor, nn

from rayrl.algorithms.information import UML_OBJECTIVES, Gaussian, uml_loss
from rayrl.config import UmlConfig
from rayrl.models.packing import Sequences
from rayrl.models.reward_model import RewardModel
from rayrl.models.view_networks import Critic, GaussianEncoder


class MultiViewRewardModel(nn.Module):
    """Rewards, with the codes of a bottleneck if asked for; or the loss of two views.

    The branch of the views exists during training only; `reward_model` is what is exported. A view is the input of the
    head: the last layer's hidden state, pooled. The paper names the layer, not the position.
    """

    def __init__(self, reward_model: RewardModel, uml: UmlConfig | None):
        super().__init__()
        self.reward_model = reward_model
        self.uml = uml
        if uml is not None:
            view_dim = reward_model.hidden_size
            # The critic compares a code with a view ("infomax"), or two codes.
            first_dim = view_dim if UML_OBJECTIVES[uml.objective].scores_views else uml.z_dim
            self.encoder = GaussianEncoder(view_dim, uml.z_dim, uml.hidden_dim)
            self.critic = Critic(first_dim, uml.z_dim, uml.hidden_dim)

    def branch(self) -> list[nn.Parameter]:
        """List the weights of encoder and critic, which learn from nothing and at a rate of their own."""
        if self.uml is None:
            return []
        return [*self.encoder.parameters(), *self.critic.parameters()]

    def forward(
        self, batch: Sequences, view_seed: int | None = None, skl_weight: float = 0.0, code_seed: int | None = None
    ) -> Tensor | tuple[Tensor, Tensor, Tensor]:
        """Return the rewards of a batch; or (loss, mi, skl) of a batch of first views, then second ones.

        Args:
            batch: the sequences.
            view_seed: draws the codes of two views; None asks for rewards.
            skl_weight: of the divergence, at this step of the training.
            code_seed: draws the codes of a bottleneck, and asks for (rewards, mu, sigma).
        """
        if code_seed is not None:
            rewards, code = self.reward_model.sampled(batch, code_seed)
            return rewards, code.mu, code.sigma
        if view_seed is None:
            return self.reward_model(batch)
        assert self.uml is not None
        views = self.reward_model.pooled(batch)
        codes = self.encoder(views)
        first_mu, second_mu = codes.mu.chunk(2)
        first_sigma, second_sigma = codes.sigma.chunk(2)
        # Only "infomax" reads the views. They are detached for it: the critic is to move the encoder, and through the
        # codes the backbone, and not to make the views themselves easy to tell apart.
        first_view, second_view = views.detach().chunk(2)
        result = uml_loss(
            (first_view, second_view),
            (Gaussian(first_mu, first_sigma), Gaussian(second_mu, second_sigma)),
            self.critic,
            objective=self.uml.objective,
            skl_weight=skl_weight,
            generator=torch.Generator(views.device).manual_seed(view_seed),
        )
        return result.loss, result.mi, result.skl
