"""Checkpoints across layouts: a change of ranks, of ZeRO stage or of offload under way changes no training."""

import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from rayrl.config import SftConfig
from rayrl.training import deepspeed_engine as zero

NUM_STEPS = 2
"""Of each leg, from one change of the layout to the next."""
LEGS = [
    (1, {}),
    (2, {"zero_stage": 2}),
    (2, {"zero_stage": 3, "cpu_offload": True}),
    (1, {"zero_stage": 1}),
    (2, {}),
    (1, {"zero_stage": 3}),
    (2, {"zero_stage": 1, "cpu_offload": True}),
    (1, {"zero_stage": 2, "cpu_offload": True}),
    (2, {"zero_stage": 3}),
    (2, {"zero_stage": 1}),
    (1, {}),
]
"""Number of ranks and settings."""
KINDS = {
    "float32": (torch.float32, False, {}),
    "bfloat16": (torch.bfloat16, False, {}),
    "bfloat16 gradients": (torch.bfloat16, False, {"grad_accum_dtype": "bfloat16"}),
    "frozen base": (torch.float32, True, {}),
}


def start(dtype, is_base_frozen, settings):
    """A model whose parameters no number of ranks divides, with a head that has a learning rate of its own."""
    training = SftConfig(learning_rate=0.05, warmup_ratio=0.2, max_grad_norm=5.0, **settings)
    torch.manual_seed(0)
    with zero.sharded_loading(training, dtype):
        model = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3), nn.Tanh(), nn.Linear(3, 1)).to(dtype)
        model[0].requires_grad_(not is_base_frozen)
        head = zero.ParameterGroup(
            parameters=list(model[4].parameters()), learning_rate=0.2, num_waiting_steps=NUM_STEPS + 1
        )
        return zero.start(model, training, dtype, NUM_STEPS * len(LEGS), [head])


def fill_padding(engine):
    """Stand for the memory with which DeepSpeed pads the last shards of ZeRO-3, and which may hold anything."""
    for parameter in engine.module.parameters():
        if hasattr(parameter, "ds_tensor"):
            num_left = parameter.ds_numel - dist.get_rank() * len(parameter.ds_tensor)
            parameter.ds_tensor[max(0, num_left) :] = float("nan")


def train(engine, kind, first, last):
    """Take steps on batches that depend on the step alone, and return the losses and whole weights."""

    def summed_loss(rows):
        return (engine(rows).float() - rows.float().sum(1, keepdim=True)).square().sum()

    losses = []
    for step in range(first, last):
        batch = torch.randn(9, 5, generator=torch.Generator().manual_seed(step)).to(KINDS[kind][0])
        own = batch[dist.get_rank() :: dist.get_world_size()]
        losses.append(zero.train_step(engine, [own], summed_loss, len(own), own).loss)
    return losses, zero.gather(engine, dict(engine.module.named_parameters()))


def run(process, folder, turn):
    """Train the legs of one of two groups: process 0 is one of its own, 1 and 2 are ranks together."""
    rank, world_size = (0, 1) if process == 0 else (process - 1, 2)
    os.environ["LOCAL_RANK"] = str(rank)
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet-{world_size}", rank=rank, world_size=world_size)
    for kind, (dtype, is_base_frozen, settings) in KINDS.items():
        if world_size == 1:
            unchanged = start(dtype, is_base_frozen, settings)
            torch.save(train(unchanged, kind, 0, NUM_STEPS * len(LEGS)), f"{folder}/{kind}")
        for leg, (num_ranks, layout) in enumerate(LEGS):
            if num_ranks == world_size:
                engine = start(dtype, is_base_frozen, settings | layout)
                first = leg * NUM_STEPS
                if leg > 0:
                    assert zero.load(engine, f"{folder}/{kind}-{leg - 1}") == {"step": first}
                trained = train(engine, kind, first, first + NUM_STEPS)
                assert engine.global_steps == first + NUM_STEPS
                fill_padding(engine)
                assert zero.has_finite_weights(engine)
                zero.save(engine, f"{folder}/{kind}-{leg}", {"step": first + NUM_STEPS})()
                if rank == 0:
                    torch.save((*trained, engine.get_lr()), f"{folder}/{kind}-{leg}/trained")
            turn.wait()


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("layouts")
    for kind in KINDS:
        for leg in range(len(LEGS)):
            (folder / f"{kind}-{leg}").mkdir()
    mp.spawn(run, (str(folder), mp.get_context("spawn").Barrier(3)), nprocs=3)
    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_a_training_goes_on_from_the_checkpoint_of_another_layout(trained, kind):
    losses, weights = torch.load(Path(trained, kind))
    legs = [torch.load(Path(trained, f"{kind}-{leg}", "trained")) for leg in range(len(LEGS))]
    tolerance = 1e-5 if KINDS[kind][0] == torch.float32 else 0.03
    assert losses[-1] < losses[0] - 0.5
    assert [loss for of_leg, _, _ in legs for loss in of_leg] == pytest.approx(losses, rel=tolerance)
    _, changed, _ = legs[-1]
    for name, weight in weights.items():
        torch.testing.assert_close(changed[name], weight, atol=tolerance, rtol=tolerance)
