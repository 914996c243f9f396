"""bfloat16 replicas on a GPU: they sample, swap weights by a folder or over NCCL, and agree with the trainer."""

import json

import pytest
import ray
import torch

from rayrl.config import EngineConfig
from rayrl.data.collate import collate
from rayrl.engines.generator import Generator, Sampling
from rayrl.engines.vllm_engine import EngineSpec
from rayrl.engines.weight_folder import WeightRecord
from rayrl.engines.weight_sums import grouped, named_sums
from rayrl.errors import WeightSyncError
from rayrl.fleets.fleet import start_fleet
from rayrl.models.policy import load_policy, response_logprobs
from rayrl.records import Checkpoint
from rayrl.training.sync.transfer import Sender, Transport, nccl_init_info
from tests.gpu.marks import needs_gpus

pytestmark = needs_gpus(1)
PROMPT = list(range(5, 25))
ROUNDING = 0.35
"""Nats by which two attention kernels may differ at a token in bfloat16."""


@pytest.fixture(scope="module")
def fleet(ray_cluster, tiny_policy):
    spec = EngineSpec(
        checkpoint=tiny_policy.checkpoint,
        config=EngineConfig(gpu_memory_utilization=0.3),
        dtype="bfloat16",
        max_model_len=None,
        trust_remote_code=False,
        on_gpu=True,
        weight_transfer="nccl",
    )
    fleet = start_fleet("gpu-generators", Generator, spec)
    fleet.wait_ready()
    yield fleet
    fleet.stop()


def trained(path, device="cpu"):
    """The policy after some training, in bfloat16."""
    model = load_policy(Checkpoint(path=path, version="tiny"), torch.bfloat16).eval()
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return model.to(device)


def state_of(model):
    return {name: weight.detach() for name, weight in model.named_parameters(remove_duplicate=False)}


def test_a_samples_logprob_is_the_trainers(fleet, tiny_policy):
    sampling = Sampling(temperature=1.0, max_tokens=16)
    (sampled,) = fleet.call("generate", tiny_policy.checkpoint, [PROMPT], [[1, 2, 3]], sampling)
    model = load_policy(tiny_policy.checkpoint, torch.bfloat16).eval().cuda()
    for said in sampled:
        with torch.no_grad():
            expected = response_logprobs(model, collate([PROMPT], [said.token_ids]).to("cuda")).item()
        assert abs(said.logprob - expected) < ROUNDING * len(said.token_ids)


def write(folder, model, sums):
    model.save_pretrained(folder)
    record = WeightRecord(dtype="bfloat16", sums=sums, text=None)
    (folder / "weight_sums.json").write_text(json.dumps(record))
    return Checkpoint(path=str(folder), version=folder.name)


def test_a_swap_by_the_folder_is_proved(fleet, tiny_policy, tmp_path):
    model = trained(tiny_policy.path)
    fleet.adopt(write(tmp_path / "folder", model, grouped(named_sums(state_of(model)))))
    weight = next(model.parameters())
    with torch.no_grad():
        weight[0, 0] = torch.nextafter(weight[0, 0], torch.tensor(9.0, dtype=weight.dtype))
    with pytest.raises(WeightSyncError, match="in the engine, and in the trainer"):
        old = trained(tiny_policy.path)
        fleet.adopt(write(tmp_path / "missed", old, grouped(named_sums(state_of(model)))))


def send_over_nccl(fleet, path, versions):
    """A trainer with a GPU of its own: the errors of updates sent one after the other."""
    state = state_of(trained(path, "cuda"))
    empty = [{name: torch.empty_like(weight, device="meta") for name, weight in state.items()}]
    sender = Sender(fleet, Transport(init_info=nccl_init_info, timeout_s=120), empty, torch.device("cuda:0"))
    errors = []
    for version in versions:
        checkpoint = Checkpoint(path="nowhere", version=version)
        transfer = sender.begin(checkpoint, grouped(named_sums(state)), in_flight=False)
        transfer.put(dict(state))
        transfer.put(None)
        errors.append(repr(transfer.wait()))
    return errors


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="NCCL takes no two ranks on one GPU")
def test_swaps_over_nccl_are_proved(fleet, tiny_policy):
    trainer = ray.remote(send_over_nccl).options(num_gpus=1)
    errors = ray.get(trainer.remote(fleet, tiny_policy.path, ["nccl-1", "nccl-2"]), timeout=300)
    assert errors == ["None", "None"]
    status = ray.get(fleet.replicas[0].status.remote(), timeout=60)
    assert (status["version"], status["num_received"]) == ("nccl-2", 2)
