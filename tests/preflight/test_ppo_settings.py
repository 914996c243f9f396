"""Settings under which PPO cannot work."""

from rayrl.errors import ConfigError
from tests.preflight.trees import changed, plan_of, refusal


def test_nccl_needs_a_gpu_for_each_of_its_ranks(rlp_tree):
    nccl = {"ppo__weight_transfer": "nccl"}
    assert "ppo.weight_transfer must be" in refusal(ConfigError, changed(rlp_tree, **nccl))
    gpus = {"CPU": 8.0, "GPU": 8.0}
    shared = changed(rlp_tree, **nccl, generators={"gpus_per_replica": 0.5})
    message = refusal(ConfigError, shared, cluster=gpus)
    assert "generators.gpus_per_replica must be at least 1" in message and "got 0.5" in message
    plan_of(rlp_tree, cluster=gpus, **nccl)
    plan_of(rlp_tree, cluster=gpus, generators={"gpus_per_replica": 0.5})
    plan_of(rlp_tree, ppo__weight_transfer="folder")


def test_the_policy_learns_after_the_warm_up_of_the_value_function(rlp_tree):
    """10 prompts that train, in 2 rollouts; 2 passes over 8 responses, 4 at a time."""
    rollouts = {"ppo__rollout_size": 8, "ppo__batch_size": 4}
    message = refusal(ConfigError, changed(rlp_tree, **rollouts, ppo__value_warmup_steps=8))
    assert "ppo.value_warmup_steps must be below the 8 optimizer steps of the training, got 8" in message
    plan_of(rlp_tree, **rollouts, ppo__value_warmup_steps=7)


def test_optimizer_steps_on_what_is_left_of_a_rollout_are_warned_of(rlp_tree):
    rollouts = {"ppo__rollout_size": 3, "ppo__k": 2}
    found = plan_of(rlp_tree, **rollouts, ppo__batch_size=4).warnings
    left = "ppo.batch_size = 4 does not divide a rollout's 6 responses: the last optimizer step of each pass"
    assert any(left in warning and "takes 2 of them" in warning for warning in found)
    assert not any("ppo." in warning for warning in plan_of(rlp_tree, **rollouts, ppo__batch_size=3).warnings)
