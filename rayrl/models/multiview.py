"""A reward model with the auxiliary branch of multi-view learning beside its head, as one module under one engine."""

import torch
from torch import Tensor, nn

from rayrl.algorithms.information import Gaussian, uml_loss
from rayrl.config import UmlConfig
from rayrl.models.reward import RewardModel
from rayrl.models.view_networks import Critic, GaussianEncoder


class MultiViewRewardModel(nn.Module):
    """Rewards, or the loss of two views. The branch lives for the training only; what is exported is `reward_model`.

    A view is what the head reads: the last layer's hidden state, pooled. The paper names the layer, not the position.
    """

    def __init__(self, reward_model: RewardModel, uml: UmlConfig | None):
        super().__init__()
        self.reward_model = reward_model
        self.uml = uml
        if uml is not None:
            view_dim = reward_model.head.in_features
            first_dim = view_dim if uml.objective == "infomax" else uml.z_dim
            self.encoder = GaussianEncoder(view_dim, uml.z_dim, uml.hidden_dim)
            self.critic = Critic(first_dim, uml.z_dim, uml.hidden_dim)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, view_seed: int | None = None
    ) -> Tensor | tuple[Tensor, Tensor, Tensor]:
        """Rewards; with a seed for the codes (loss, mi, skl) of a batch of first views, then second ones.

        "infomax" compares the codes with detached views: the critic is to move the encoder, and through the codes the
        backbone, and not to make the views themselves easy to tell apart.
        """
        if view_seed is None:
            return self.reward_model(input_ids, attention_mask, position_ids)
        assert self.uml is not None
        views = self.reward_model.pooled(input_ids, attention_mask, position_ids)
        both = self.encoder(views)
        first, second = (Gaussian(*halves) for halves in zip(both.mu.chunk(2), both.sigma.chunk(2), strict=True))
        one, other = views.detach().chunk(2)
        outcome = uml_loss(
            (one, other),
            (first, second),
            self.critic,
            objective=self.uml.objective,
            skl_weight=self.uml.skl_weight,
            generator=torch.Generator(views.device).manual_seed(view_seed),
        )
        return outcome.loss, outcome.mi, outcome.skl
