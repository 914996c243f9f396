"""One optimizer step: its mean, and losses and gradients that are not finite, on real DeepSpeed in this process."""

import math

import psutil
import pytest
import torch
from torch import nn

from rayrl.config import SftConfig
from rayrl.errors import TrainingStopped
from rayrl.training import deepspeed_engine as zero
from rayrl.training.deepspeed_engine import train_step
from rayrl.training.steps import row_names

pytestmark = pytest.mark.filterwarnings("ignore")  # of DeepSpeed and torch, where they are imported here


class Engine:
    """As much of a DeepSpeed engine as a step touches."""

    world_size, global_steps, device, skipped_in_a_row = 1, 6, torch.device("cpu"), 0
    stepped, optimizer = False, None

    def __init__(self, grad_norm=1.5):
        self.grad_norm = grad_norm

    def backward(self, loss):
        self.loss = loss

    def step(self):
        self.stepped = True

    def get_global_grad_norm(self):
        return self.grad_norm


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_stops_before_the_optimizer(bad):
    engine = Engine()
    with pytest.raises(TrainingStopped, match=r"at step 7; look at .*; the last checkpoint is intact"):
        train_step(engine, [1.0, bad], torch.tensor, 2, 0.0)
    assert not engine.stepped


def test_a_loss_that_is_not_finite_names_its_rows():
    names = row_names([{"chosen_id": "a", "rejected_id": "b"}, {"response_id": "c", "prompt_id": "d"}, {"id": "e"}])
    with pytest.raises(TrainingStopped, match=r"the loss is nan at step 7 on rows a/b, c, e; look"):
        train_step(Engine(), [float("nan")], torch.tensor, 3, 0.0, names)


def test_a_large_batch_is_named_by_its_first_rows():
    with pytest.raises(TrainingStopped, match=r"on rows 0, 1, .*, 15 and 84 more; look"):
        train_step(Engine(), [float("nan")], torch.tensor, 100, 0.0, [str(n) for n in range(100)])


def test_a_step_is_the_mean_over_samples():
    engine = Engine()
    assert train_step(engine, [3.0, 5.0], torch.tensor, 4, 0.0) == (2.0, 1.5, 0)
    assert engine.loss.item() == pytest.approx(5 / 4)
    assert engine.stepped


def test_skipped_steps_end_a_training_only_in_a_row():
    engine = Engine()
    for norm in (math.inf, math.nan, 1.0, math.inf, math.nan):
        engine.grad_norm = norm
        assert train_step(engine, [1.0], torch.tensor, 1, 0.0).num_skipped == (not math.isfinite(norm))
    with pytest.raises(TrainingStopped, match="3 steps in a row, the last of them step 7 on rows a, although the loss"):
        train_step(engine, [1.0], torch.tensor, 1, 0.0, ["a"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_step_without_a_finite_gradient_changes_no_weight(process_group, stage, dtype):
    torch.manual_seed(0)
    training = SftConfig(zero_stage=stage, learning_rate=0.1, schedule="constant", warmup_ratio=0.0, max_grad_norm=0.5)
    with zero.sharded_loading(training, dtype):
        model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 1)).to(dtype)
        engine = zero.start(model, training, dtype, 10)
    inputs = torch.ones(3, 4, dtype=dtype)

    def weights():
        return torch.cat([p.flatten() for p in zero.gather(engine, dict(engine.module.named_parameters())).values()])

    def fine(batch):
        return engine(batch).float().square().sum()

    def without_gradient(batch):
        return (engine(batch).float().sum() * 0).sqrt() + 1  # 1, and the slope of the root is infinite at 0

    before = weights()
    taken = train_step(engine, [inputs], fine, 3, inputs)
    after = weights()
    assert taken.num_skipped == 0 and not torch.equal(before, after)
    assert taken.grad_norm == pytest.approx(gradient_norm(training, dtype, inputs), rel=1e-2)
    taken = train_step(engine, [inputs], without_gradient, 3, inputs)
    assert taken.loss == pytest.approx(1 / 3)
    assert taken.num_skipped == 1 and not math.isfinite(taken.grad_norm)
    assert torch.equal(weights(), after) and zero.has_finite_weights(engine)
    assert train_step(engine, [inputs], fine, 3, inputs).num_skipped == 0
    assert not torch.equal(weights(), after), "the training goes on"


def gradient_norm(training, dtype, inputs):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 1)).to(dtype)
    (model(inputs).float().square().sum() / 3).backward()
    return math.sqrt(sum(p.grad.float().square().sum().item() for p in model.parameters()))


def test_weights_that_are_not_finite_are_found(process_group):
    training = SftConfig(zero_stage=3)
    with zero.sharded_loading(training, torch.float32):
        engine = zero.start(nn.Linear(4, 4), training, torch.float32, 10)
    assert zero.has_finite_weights(engine)
    next(engine.module.parameters()).ds_tensor[2] = float("nan")
    assert not zero.has_finite_weights(engine)


@pytest.mark.parametrize("is_memory_full", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("stage", [0, 2, 3])
def test_a_checkpoint_is_of_the_step_at_which_it_was_copied(
    process_group, tmp_path, monkeypatch, stage, dtype, is_memory_full
):
    if is_memory_full:  # then it is written at once
        full = psutil.virtual_memory()._replace(available=100)
        monkeypatch.setattr("psutil.virtual_memory", lambda: full)
    training = SftConfig(zero_stage=stage, learning_rate=0.1, schedule="constant", warmup_ratio=0.0)
    with zero.sharded_loading(training, dtype):
        engine = zero.start(nn.Linear(4, 4).to(dtype), training, dtype, 10)
    inputs = torch.ones(3, 4, dtype=dtype)

    def step():
        train_step(engine, [inputs], lambda batch: engine(batch).float().square().sum(), 3, inputs)
        weights = zero.gather(engine, dict(engine.module.named_parameters()))
        return torch.cat([weight.flatten() for weight in weights.values()])

    step()
    write = zero.save(engine, str(tmp_path), {"step": 1})
    after_two = step()
    step()
    write()
    assert zero.load(engine, str(tmp_path)) == {"step": 1}
    assert torch.equal(step(), after_two), "weights and Adam's state are those of step 1"
