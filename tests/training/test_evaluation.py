"""Evaluations along a training: their mean, when they are due, and which weights are written; in this process."""

import pyarrow as pa
import pytest
import torch

from rayrl.config import PolicyConfig, SftConfig
from rayrl.data.blocks import BlockTable
from rayrl.records import Checkpoint
from rayrl.training import launch
from rayrl.training.evaluation import Evaluation, mean_loss
from rayrl.training.sft import SftJob

pytestmark = pytest.mark.filterwarnings("ignore")  # of DeepSpeed and torch, where they are imported here


class Engine:
    """As much of a DeepSpeed engine as an evaluation touches."""

    device = torch.device("cpu")
    mode = "train"

    def train(self):
        self.mode = "train"

    def eval(self):
        self.mode = "eval"


def test_the_mean_is_over_the_weights_of_all_batches_without_gradients_or_dropout():
    engine, weight = Engine(), torch.ones((), requires_grad=True)

    def summed_loss(batch):
        loss = weight * batch.sum()
        assert engine.mode == "eval"
        assert not loss.requires_grad
        return loss

    batches = [[torch.tensor([1.0, 2.0]), torch.tensor([6.0])], [], [torch.tensor([3.0])]]
    assert mean_loss(engine, batches, summed_loss, len, torch.zeros(1)) == 3.0
    assert engine.mode == "train"


def evaluation(folder, monkeypatch, losses, written, **settings):
    """An evaluation of one held-out row whose losses are made up, and which writes the number of evaluations so far."""
    monkeypatch.setattr(launch, "rank", lambda: 0)
    monkeypatch.setattr(launch, "world_size", lambda: 1)
    held_out = BlockTable(str(folder / "held_out"), 1)
    held_out.write(0, pa.table({"n": [0]}))
    training = SftConfig(**settings)
    remaining, seen = iter(losses), []

    def summed_loss(_):
        seen.append(next(remaining))
        return torch.tensor(seen[-1])

    job = SftJob(
        **{"stage": "sft", "run_url": "", "checkpoint_url": "", "policy": PolicyConfig(path="policy")},
        **{"start": Checkpoint(path="policy", version="m0"), "training": training, "dtype": "float32", "seed": 0},
        **{"num_rows": 1, "held_out": held_out},
    )
    return Evaluation(
        **{"job": job, "training": training, "num_steps": 7, "tables": job.held_out_tables, "engine": Engine()},
        **{"collated": lambda rows: rows, "summed_loss": summed_loss, "weight": lambda _: 1, "idle": {}},
        export=lambda: written.append(len(seen)),
    )


def test_evaluations_are_due_every_few_steps_and_at_the_end(tmp_path, monkeypatch):
    written = []
    evaluated = evaluation(tmp_path, monkeypatch, [3.0, 1.0, 2.0], written, evaluate_every=3)
    curve = {step: evaluated.after(step) for step in range(1, 8)}
    assert {step: values["eval_loss"] for step, values in curve.items() if values} == {3: 3.0, 6: 1.0, 7: 2.0}
    assert not written
    evaluated.finish()
    assert written == [3], "without patience the last weights are written"


def test_with_patience_the_best_weights_are_written_last(tmp_path, monkeypatch):
    written = []
    losses = [3.0, 1.0, 2.0, 1.5]
    evaluated = evaluation(tmp_path, monkeypatch, losses, written, evaluate_every=1, patience=2)
    for step in range(1, 5):
        assert not evaluated.stopping.is_over
        evaluated.after(step)
    assert evaluated.stopping.is_over
    evaluated.finish()
    assert written == [1, 2]


def test_weights_are_written_even_if_no_evaluation_gave_a_number(tmp_path, monkeypatch):
    written = []
    evaluated = evaluation(tmp_path, monkeypatch, [float("nan")], written, evaluate_every=7, patience=1)
    evaluated.after(7)
    evaluated.finish()
    assert written == [1]


def test_nothing_is_evaluated_unless_it_is_set(tmp_path, monkeypatch):
    evaluated = evaluation(tmp_path, monkeypatch, [], [])
    assert not any(evaluated.after(step) for step in range(1, 8))
