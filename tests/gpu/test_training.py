"""bfloat16 training on GPUs: DPO alone, and PPO beside a replica that has another GPU."""

import pytest
import ray
import torch

from rayrl.config import DpoConfig, EngineConfig
from rayrl.engines.generator import Generator
from rayrl.engines.vllm_engine import EngineSpec
from rayrl.fleets.fleet import start_fleet
from rayrl.training.sync.transfer import Transport, nccl_init_info
from tests.gpu.marks import needs_gpus
from tests.training.test_fit import NUM_ROWS, run_dpo, write_pairs
from tests.training.test_ppo import train, write_prompts

pytestmark = needs_gpus(1)


def test_dpo_learns(ray_cluster, tiny_policy, tmp_path):
    table = write_pairs(tmp_path / "pairs", tiny_policy.load())
    dpo = DpoConfig(batch_size=2 * NUM_ROWS, epochs=5, learning_rate=1e-4, micro_batch_tokens=128)
    curve = run_dpo(tmp_path / "run", table, tiny_policy, dpo, reference="pass", on_gpu=True)
    assert curve[0]["loss"] == pytest.approx(0.693, abs=0.02)
    assert curve[-1]["loss"] < curve[0]["loss"] - 0.01


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="trainer and replica need a GPU each")
@pytest.mark.parametrize("transport", [None, Transport(init_info=nccl_init_info)], ids=["folder", "nccl"])
def test_ppo_raises_the_reward(ray_cluster, tiny_policy, tmp_path, transport):
    spec = EngineSpec(
        checkpoint=tiny_policy.checkpoint,
        config=EngineConfig(gpu_memory_utilization=0.3),
        dtype="bfloat16",
        max_model_len=None,
        trust_remote_code=False,
        on_gpu=True,
        weight_transfer=None if transport is None else "nccl",
    )
    fleet = start_fleet("gpu-ppo", Generator, spec)
    try:
        fleet.wait_ready()
        prompts = write_prompts(tmp_path / "prompts")
        curve = train(tmp_path, prompts, tiny_policy, fleet, transport, on_gpu=True, epochs=6)
        first, last = (sum(row["reward"] for row in rows) / 3 for rows in (curve[:3], curve[-3:]))
        assert last > first + 0.5
        status = ray.get(fleet.replicas[0].status.remote(), timeout=60)
        assert status["version"] == "tiny-ppo-18"
        assert status["num_received"] == (0 if transport is None else 18)
    finally:
        fleet.stop()
