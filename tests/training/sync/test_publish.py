"""PPO whose weights reach the replica without a folder goes as it goes with one."""

import pytest
import ray

from rayrl.config import EngineConfig
from rayrl.engines.generator import Generator
from rayrl.engines.vllm_engine import EngineSpec
from rayrl.fleets.fleet import start_fleet
from tests.training.sync.gloo_transfer import EXTENSION, GLOO
from tests.training.test_ppo import kill_the_replica_after, train, write_prompts


@pytest.fixture
def fleet(ray_cluster, tiny_policy):
    spec = EngineSpec(
        checkpoint=tiny_policy.checkpoint,
        config=EngineConfig(engine_args={"worker_extension_cls": EXTENSION}),
        dtype="float32",
        max_model_len=None,
        trust_remote_code=False,
        on_gpu=False,
        weight_transfer="gloo",
    )
    fleet = start_fleet("test-synced", Generator, spec)
    fleet.wait_ready()
    yield fleet
    fleet.stop()


def num_received(fleet):
    return ray.get(fleet.replicas[0].status.remote(), timeout=120)["num_received"]


@pytest.mark.slow
def test_two_sharded_workers_send_their_weights_and_survive_the_loss_of_the_replica(fleet, tiny_policy, tmp_path):
    prompts = write_prompts(tmp_path / "prompts")
    settings = {"num_workers": 2, "zero_stage": 3, "max_rollouts": 5}
    by_folder = train(tmp_path / "a", prompts, tiny_policy, fleet, **settings)
    assert num_received(fleet) == 0
    killed = kill_the_replica_after(f"{tmp_path}/b/metrics/ppo.jsonl", 3, fleet)
    sent = train(tmp_path / "b", prompts, tiny_policy, fleet, GLOO, **settings)
    assert killed.pids
    assert num_received(fleet) >= 1, "the replica that took the dead one's place is in the group"
    assert [row["step"] for row in sent] == [row["step"] for row in by_folder] == list(range(1, 6))
    for name in ("reward", "kl", "policy_loss", "value_loss"):  # every request was answered by the weights it named
        assert [row[name] for row in sent] == pytest.approx([row[name] for row in by_folder], abs=1e-3)
