"""The two networks of PPO in one module, so that one engine, one optimizer and one checkpoint hold both."""

from typing import Any, NamedTuple

from jaxtyping import Float
from torch import Tensor, nn

from rayrl.algorithms.preference import token_logprobs
from rayrl.models.reward import Float32Linear


class TokenValues(NamedTuple):
    """What the two networks say of each response token; padding holds whatever came out."""

    logprobs: Float[Tensor, "batch seq"]
    """log pi(y_t | x, y_<t), nats."""
    values: Float[Tensor, "batch seq"]
    """V(x, y_<t): the return expected before the token is written."""


class ActorCritic(nn.Module):
    """pi and V, each with a backbone of its own. V's head starts at zero (AlpacaFarm)."""

    def __init__(self, policy: Any, value_backbone: Any):
        super().__init__()
        self.policy = policy
        self.value_backbone = value_backbone
        hidden_size = value_backbone.config.get_text_config().hidden_size
        self.value_head = Float32Linear(hidden_size, 1)
        nn.init.zeros_(self.value_head.weight)
        nn.init.zeros_(self.value_head.bias)

    def gradient_checkpointing_enable(self, **options: Any) -> None:
        """As a transformers model has it, for both networks."""
        for network in (self.policy, self.value_backbone):
            network.gradient_checkpointing_enable(**options)

    def forward(self, batch: Any) -> TokenValues:
        """Read a `TokenBatch`."""
        num_response = batch.response_ids.shape[1]
        hidden = self.value_backbone(
            input_ids=batch.input_ids,
            attention_mask=batch.attention_mask,
            position_ids=batch.position_ids,
            logits_to_keep=1,
            output_hidden_states=True,
            use_cache=False,
        ).hidden_states[-1]
        before = hidden[:, -num_response - 1 : -1]  # the state in which token t is chosen ends at token t - 1
        return TokenValues(policy_logprobs(self.policy, batch), self.value_head(before).squeeze(-1))


def policy_logprobs(policy: Any, batch: Any) -> Float[Tensor, "batch seq"]:
    """Log pi(y_t | x, y_<t) of a `TokenBatch`'s response tokens, nats."""
    logits = policy(
        input_ids=batch.input_ids,
        attention_mask=batch.attention_mask,
        position_ids=batch.position_ids,
        logits_to_keep=batch.response_ids.shape[1] + 1,
        use_cache=False,
    ).logits
    return token_logprobs(logits[:, :-1], batch.response_ids)
