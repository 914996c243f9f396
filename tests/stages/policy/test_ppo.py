"""The job of a PPO, as its stage makes it."""

from rayrl.config import load_config
from rayrl.stages.policy.ppo import transport


def test_every_rank_of_a_replica_is_in_the_trainers_group():
    ranks = ["generators.tensor_parallel_size=2", "generators.pipeline_parallel_size=3"]
    config = load_config("jobs/configs/rlp_quickstart.toml", [*ranks, 'ppo.weight_transfer="nccl"'])
    sent = transport(config)
    assert sent is not None and sent.ranks_per_replica == 6
