"""bfloat16 replicas on a GPU: they sample, swap weights by a folder or over NCCL, and agree with the trainer."""

import json

import pytest
import ray
import torch

from rayrl.config import EngineConfig
from rayrl.data.collate import collate
from rayrl.engines.generator import Generator, Sampling
from rayrl.engines.vllm_engine import PROBE_TOLERANCE, EngineSpec
from rayrl.fleets.fleet import start_fleet
from rayrl.models.policy import load_policy, response_logprobs
from rayrl.records import Checkpoint
from rayrl.training.sync.export import PROBE_CANDIDATES, probe_prompt
from rayrl.training.sync.transfer import Sender, Transport, nccl_init_info
from tests.gpu.marks import needs_gpus

pytestmark = needs_gpus(1)
PROMPT = list(range(5, 25))


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
    """The policy after some training, in bfloat16, and the probe of it."""
    model = load_policy(Checkpoint(path=path, version="tiny"), torch.bfloat16).eval()
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
        model = model.to(device)
        prompt = probe_prompt(model.config)
        logits = model(torch.tensor([prompt], device=device)).logits[0, -1].float()
    top = logits.log_softmax(-1).topk(PROBE_CANDIDATES)
    return model, {"prompt_token_ids": prompt, "token_ids": top.indices.tolist(), "logprobs": top.values.tolist()}


def next_logprobs(fleet, checkpoint, probe):
    (answer,) = fleet.call("next_token_logprobs", checkpoint, [probe["prompt_token_ids"]], probe["token_ids"])
    return answer


def test_a_samples_logprob_is_the_trainers(fleet, tiny_policy):
    sampling = Sampling(temperature=1.0, max_tokens=16)
    (sampled,) = fleet.call("generate", tiny_policy.checkpoint, [PROMPT], [[1, 2, 3]], sampling)
    model = load_policy(tiny_policy.checkpoint, torch.bfloat16).eval().cuda()
    for said in sampled:
        with torch.no_grad():
            expected = response_logprobs(model, collate([PROMPT], [said.token_ids]).to("cuda")).item()
        assert abs(said.logprob - expected) < PROBE_TOLERANCE["bfloat16"] * len(said.token_ids)


def test_a_swap_by_the_folder_is_proved(fleet, tiny_policy, tmp_path):
    model, probe = trained(tiny_policy.path)
    before = next_logprobs(fleet, tiny_policy.checkpoint, probe)
    model.save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "probe.json").write_text(json.dumps(probe))
    checkpoint = Checkpoint(path=str(tmp_path / "model"), version="folder")
    fleet.adopt(checkpoint)
    after = next_logprobs(fleet, checkpoint, probe)
    assert after == pytest.approx(probe["logprobs"], abs=PROBE_TOLERANCE["bfloat16"])
    assert before != pytest.approx(probe["logprobs"], abs=PROBE_TOLERANCE["bfloat16"])


def send_over_nccl(fleet, path, versions):
    """A trainer with a GPU of its own: the errors of updates sent one after the other."""
    model, probe = trained(path, "cuda")
    state = {name: weight.detach() for name, weight in model.named_parameters(remove_duplicate=False)}
    empty = [{name: torch.empty_like(weight, device="meta") for name, weight in state.items()}]
    sender = Sender(fleet, Transport(init_info=nccl_init_info, timeout_s=120), empty, torch.device("cuda:0"))
    errors = []
    for version in versions:
        transfer = sender.begin(Checkpoint(path="nowhere", version=version), probe, in_flight=False)
        transfer.put(dict(state))
        transfer.put(None)
        errors.append(repr(transfer.wait()))
    return errors, probe


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="NCCL takes no two ranks on one GPU")
def test_swaps_over_nccl_are_proved(fleet, tiny_policy):
    trainer = ray.remote(send_over_nccl).options(num_gpus=1)
    errors, probe = ray.get(trainer.remote(fleet, tiny_policy.path, ["nccl-1", "nccl-2"]), timeout=300)
    assert errors == ["None", "None"]
    status = ray.get(fleet.replicas[0].status.remote(), timeout=60)
    assert (status["version"], status["num_received"]) == ("nccl-2", 2)
    answer = next_logprobs(fleet, Checkpoint(path="nowhere", version="nccl-2"), probe)
    assert answer == pytest.approx(probe["logprobs"], abs=PROBE_TOLERANCE["bfloat16"])
