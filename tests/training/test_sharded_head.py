"""Logits in chunks under ZeRO-3: the head's weights are gathered for all chunks, in the backward pass too."""

import os

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from rayrl.config import LoraConfig, SftConfig
from rayrl.data.collate import collate
from rayrl.models import policy as policy_module
from rayrl.models.policy import TokenLogprobs, add_lora, load_policy
from rayrl.records import Checkpoint
from rayrl.training import deepspeed_engine as zero

BATCHES = [
    collate([[1, 20, 30, 40], [1, 50]], [[5, 6], [7, 8, 9, 2, 21, 22, 23]]),
    collate([[1, 60, 70]], [[2, 3, 4]]),
    collate([[1, 11, 12, 13]], [[14, 15, 16, 17, 18, 19]]),
]
STEPS = 2


def losses_of(rank, world_size, stage, lora, rendezvous, path, results):
    """Train on this rank's share of the batches, with logits of 4 tokens at a time."""
    os.environ["LOCAL_RANK"] = str(rank)
    torch.set_num_threads(1)
    policy_module.LOGIT_BYTES = 4 * 4 * 768
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=world_size)
    training = SftConfig(zero_stage=stage, learning_rate=1e-3, lora=lora, gradient_checkpointing=True)
    torch.manual_seed(0)
    with zero.sharded_loading(training, torch.float32):
        m1 = Checkpoint(path=path, version="m1")
        policy = load_policy(m1, torch.float32)
        if lora:
            policy = add_lora(policy, lora, m1)
        engine = zero.start(TokenLogprobs(policy), training, torch.float32, STEPS)
    engine.train()
    losses = []
    for _ in range(STEPS + 1):
        mine = BATCHES[rank::world_size]
        losses.append(zero.train_step(engine, mine, lambda batch: -engine(batch).sum(), len(mine), BATCHES[0]).loss)
    if rank == 0:
        torch.save(losses, results)


@pytest.mark.parametrize("lora", [None, LoraConfig(rank=4, alpha=8)])
def test_two_sharded_ranks_take_the_steps_of_one(lora, tiny_policy, tmp_path):
    losses = {}
    for stage, world_size in ((0, 1), (3, 2)):
        results = tmp_path / f"losses-{stage}"
        arguments = (world_size, stage, lora, str(tmp_path / f"meet-{stage}"), tiny_policy.checkpoint.path, results)
        mp.spawn(losses_of, arguments, nprocs=world_size)
        losses[stage] = torch.load(results)
    assert losses[3] == pytest.approx(losses[0], abs=1e-3)
    assert losses[0][-1] < losses[0][0] - 0.5
