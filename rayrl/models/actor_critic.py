"""Actor and critic of PPO in one module, so that one engine, one optimizer and one checkpoint hold both.

Without a critic the module is the actor alone.
"""

from typing import TYPE_CHECKING, NamedTuple

from jaxtyping import Float
from torch import Tensor, nn

from rayrl.models.packing import hidden_states
from rayrl.models.policy import Responses, on_responses, response_token_logprobs
from rayrl.models.scalar_head import zero_head

if TYPE_CHECKING:
    from rayrl.models.packing import Backbone


class TokenValues(NamedTuple):
    """Outputs of the networks for each response token; 0 on padding."""

    logprobs: Float[Tensor, "batch seq"]
    """log pi(y_t | x, y_<t), nats."""
    values: Float[Tensor, "batch seq"] | None
    """V(x, y_<t): the return expected before the token is written. None of an actor alone."""


class Actor(nn.Module):
    """pi alone, for advantages that read no value."""

    def __init__(self, policy: "Backbone"):
        super().__init__()
        self.policy = policy

    def forward(self, batch: Responses) -> TokenValues:
        """Read the response tokens of a micro-batch."""
        return TokenValues(response_token_logprobs(self.policy, batch), None)


class ActorCritic(Actor):
    """pi and V, each with a backbone of its own. V's head starts at zero, as in AlpacaFarm (arXiv 2305.14387)."""

    def __init__(self, policy: "Backbone", value_backbone: "Backbone"):
        super().__init__(policy)
        self.value_backbone = value_backbone
        self.value_head = zero_head(value_backbone)

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: dict[str, bool] | None = None) -> None:
        """Turn gradient checkpointing on for both networks, with the arguments of a transformers model."""
        for network in (self.policy, self.value_backbone):
            network.gradient_checkpointing_enable(gradient_checkpointing_kwargs=gradient_checkpointing_kwargs)

    def forward(self, batch: Responses) -> TokenValues:
        """Read the response tokens of a micro-batch with both networks."""
        # The state from which token t is chosen ends at token t - 1.
        before = hidden_states(self.value_backbone, batch)[batch.predicting]
        values = on_responses(self.value_head(before).squeeze(-1), batch.response_mask)
        return TokenValues(response_token_logprobs(self.policy, batch), values)
