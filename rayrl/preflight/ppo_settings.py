"""Checks of PPO's settings against the cluster and the policy's context."""

from rayrl.config import RunConfig
from rayrl.errors import ConfigError
from rayrl.preflight.cluster import Cluster
from rayrl.preflight.model import ModelFacts


def check_transfer(config: RunConfig, cluster: Cluster) -> None:
    """Refuse weight transfer by NCCL where it cannot work.

    Raises:
        ConfigError: names the setting.
    """
    if config.ppo.weight_transfer != "nccl":
        return
    if cluster.most("GPU") == 0:
        raise ConfigError(
            'ppo.weight_transfer must be "auto" or "folder" on a cluster without GPUs, got "nccl"; leave it out'
        )
    # NCCL refuses two ranks on one GPU.
    if config.generators.gpus_per_replica < 1:
        raise ConfigError(
            'generators.gpus_per_replica must be at least 1 when ppo.weight_transfer is "nccl", which gives each of '
            f"its ranks a GPU of its own, got {config.generators.gpus_per_replica:g}; raise it, or set "
            'ppo.weight_transfer = "folder"'
        )


def check_warmup(config: RunConfig, num_prompts: int) -> None:
    """Refuse a warm-up of PPO's value function that the policy's training does not outlast.

    Args:
        config: the run.
        num_prompts: prompts that train.

    Raises:
        ConfigError: names the setting.
    """
    num_updates = config.ppo.num_updates(num_prompts)
    if config.ppo.value_warmup_steps >= num_updates:
        raise ConfigError(
            f"ppo.value_warmup_steps must be below the {num_updates} optimizer steps of the training, got "
            f"{config.ppo.value_warmup_steps}: the policy would never learn; lower it"
        )


def check_room(config: RunConfig, model: ModelFacts) -> None:
    """Refuse settings under which PPO has no room for a prompt, or no prompt to measure the reward on.

    Raises:
        ConfigError: names the setting.
    """
    if model.max_model_len is not None and config.generate.max_tokens >= model.max_model_len:
        raise ConfigError(
            f"generate.max_tokens must leave room for a prompt in the context of {model.max_model_len} tokens, got "
            f"{config.generate.max_tokens}; lower it"
        )
    if config.pool.num_eval < 1:
        raise ConfigError(
            "pool.num_eval must be at least 1: PPO measures the reward on held-out prompts, got 0; hold some out"
        )
