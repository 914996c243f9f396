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
