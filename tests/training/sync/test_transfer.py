"""Weights that go from one process to two replicas without a folder, and what happens when a replica does not live to
take them. Over gloo; the replicas, the check of the weights and the order of calls are those of NCCL.
"""

import json
import os
import signal
import time
from pathlib import Path

import pytest
import ray
import torch

from rayrl.config import EngineConfig
from rayrl.data.collate import collate
from rayrl.engines.generator import Generator
from rayrl.engines.vllm_engine import EngineSpec
from rayrl.engines.weight_folder import RECORD_FILE
from rayrl.engines.weight_sums import grouped, named_sums
from rayrl.errors import StageTimeout, WeightSyncError
from rayrl.fleets.fleet import start_fleet
from rayrl.models.policy import response_logprobs
from rayrl.records import Checkpoint
from rayrl.training.sync.gather import split_into_buckets
from rayrl.training.sync.transfer import Sender, Transfer, Transport
from tests.training.sync.gloo_transfer import EXTENSION, GLOO

PROMPT = [3 + (7 * i) % 700 for i in range(300)]
"""Longer than a block of the key-value cache, so that it is cached."""
SAID = [100, 200, 300, 2]


@pytest.fixture(scope="module")
def fleet(ray_cluster, tiny_policy):
    """Two replicas that can take weights over gloo."""
    spec = EngineSpec(
        checkpoint=tiny_policy.checkpoint,
        config=EngineConfig(num_replicas=2, kv_cache_mb=32, engine_args={"worker_extension_cls": EXTENSION}),
        dtype="float32",
        max_model_len=None,
        trust_remote_code=False,
        on_gpu=False,
        weight_transfer="gloo",
    )
    fleet = start_fleet("test-transfers", Generator, spec)
    fleet.wait_ready()
    yield fleet
    fleet.stop()


class Trained:
    """The tiny policy after some training: its weights, what it must answer, and its folder."""

    def __init__(self, policy, folder, seed):
        self.model = policy.load()
        torch.manual_seed(seed)
        with torch.no_grad():
            for parameter in self.model.parameters():
                parameter.add_(0.02 * torch.randn_like(parameter))
        self.checkpoint = Checkpoint(path=str(folder), version=f"trained-{seed}")
        named = dict(self.model.named_parameters())
        self.sums = grouped(named_sums(named))
        sizes = {name: weight.numel() * weight.element_size() for name, weight in named.items()}
        buckets = split_into_buckets(sizes, 200_000)
        self.buckets = [{name: named[name].detach().clone() for name in names} for names in buckets]

    def save(self):
        self.model.save_pretrained(self.checkpoint.path, state_dict={k: v for b in self.buckets for k, v in b.items()})
        record = {"dtype": "float32", "sums": self.sums, "text": None}
        (Path(self.checkpoint.path) / RECORD_FILE).write_text(json.dumps(record))

    def logprob(self):
        with torch.no_grad():
            return response_logprobs(self.model, collate([PROMPT], [SAID])).item()


@pytest.fixture
def trained(tiny_policy, tmp_path):
    return [Trained(tiny_policy, tmp_path / str(seed), seed) for seed in (1, 2, 3)]


@pytest.fixture(scope="module")
def sender(fleet, tiny_policy, tmp_path_factory):
    """A trainer's only process."""
    buckets = Trained(tiny_policy, tmp_path_factory.mktemp("unused"), 0).buckets
    empty = [{name: torch.empty_like(weight, device="meta") for name, weight in state.items()} for state in buckets]
    return Sender(fleet, GLOO, empty, torch.device("cpu"))


def send(sender, trained, meanwhile=lambda: None):
    transfer = sender.begin(trained.checkpoint, trained.sums, in_flight=False)
    for number, bucket in enumerate(trained.buckets):
        if number == 2:
            meanwhile()
        transfer.put(bucket)
    transfer.put(None)
    return transfer.wait()


def statuses(fleet):
    return ray.get([replica.status.remote() for replica in fleet.replicas], timeout=120)


def all_serve(fleet, trained):
    asked = [r.logprobs.remote(trained.checkpoint, [PROMPT], [SAID]) for r in fleet.replicas]
    return [said for (said,) in ray.get(asked, timeout=120)] == pytest.approx([trained.logprob()] * 2, abs=1e-3)


def test_weights_reach_every_replica_without_a_folder_update_after_update(fleet, sender, trained):
    first, second, _ = trained
    assert send(sender, first) is None
    assert all_serve(fleet, first), "a long prompt, so a prefix cache that was kept would show"
    assert send(sender, second) is None
    assert all_serve(fleet, second)
    assert [(s["version"], s["num_received"]) for s in statuses(fleet)] == [("trained-2", 2)] * 2


@pytest.mark.slow
def test_a_replica_that_restarts_loads_the_folder_and_the_next_update_makes_a_new_group(fleet, sender, trained):
    first, second, _ = trained
    assert send(sender, first) is None
    pid = statuses(fleet)[0]["pid"]
    os.kill(pid, signal.SIGKILL)
    asked = fleet.replicas[0].logprobs.remote(first.checkpoint, [PROMPT], [SAID])  # before there is a folder
    time.sleep(1.0)
    first.save()
    assert ray.get(asked, timeout=120) == pytest.approx([first.logprob()], abs=1e-3)
    restarted, other = statuses(fleet)
    assert restarted["pid"] != pid and restarted["num_received"] == 0 < other["num_received"]
    assert send(sender, second) is None
    assert all_serve(fleet, second)
    assert [s["num_received"] for s in statuses(fleet)] == [1, other["num_received"] + 1]


@pytest.mark.slow
def test_an_update_that_a_replica_does_not_survive_fails_and_the_folder_takes_its_place(fleet, sender, trained):
    first, second, third = trained
    assert send(sender, first) is None
    victim = statuses(fleet)[1]["pid"]
    started = time.monotonic()
    assert send(sender, second, meanwhile=lambda: os.kill(victim, signal.SIGKILL)) is not None
    assert time.monotonic() - started < GLOO.timeout_s, "nobody waited for the dead replica"
    sender.leave()
    second.save()
    fleet.adopt(second.checkpoint, timeout_s=120)
    assert all_serve(fleet, second)
    assert send(sender, third) is None
    assert all_serve(fleet, third)


def test_an_update_of_other_weights_than_the_trainers_is_refused(fleet, sender, trained):
    first, second, _ = trained
    first.sums = second.sums
    error = send(sender, first)
    assert isinstance(error, WeightSyncError) and " in the engine, and in the trainer " in str(error)
    sender.leave()
    second.save()
    fleet.adopt(second.checkpoint, timeout_s=120)
    assert all_serve(fleet, second)


def test_an_update_that_nobody_takes_ends_and_drops_what_is_put():
    transfer = Transfer(Checkpoint(path="p", version="v"), {}, False, timeout_s=0.5)
    for _ in range(3):
        transfer.put({"weight": torch.zeros(1)})
    assert isinstance(transfer.wait(), StageTimeout) and "v was not sent" in str(transfer.wait())
    with pytest.raises(StageTimeout):
        next(iter(transfer))


def test_what_is_put_comes_out_in_order_and_the_first_end_is_believed():
    transfer = Transfer(Checkpoint(path="p", version="v"), {}, False, timeout_s=5)
    transfer.put({"a": torch.zeros(1), "b": torch.ones(1)})
    read = iter(transfer)
    assert [next(read)[0], next(read)[0]] == ["a", "b"]
    transfer.put(None)
    assert list(read) == []
    transfer.end()
    transfer.end(RuntimeError("late"))
    assert transfer.wait() is None


def test_nccl_is_told_the_group_and_a_bound_on_its_buffers():
    from rayrl.training.sync.transfer import PACKED_BYTES, nccl_init_info

    info = nccl_init_info(rank=0, master_address="10.0.0.1", master_port=1234, world_size=5)
    assert (info.backend, info.is_sender, info.world_size) == ("nccl", True, 5)
    assert info.packed and info.packed_buffer_size_bytes == PACKED_BYTES
    assert Transport(init_info=nccl_init_info).ranks_per_replica == 1
