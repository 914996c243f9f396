"""Cases of the memory benchmark, and the checks of one GPU. Nothing is measured here."""

import pytest
import torch
from transformers import LlamaForCausalLM

from jobs.bench.one_gpu import CHECKS, TRAINERS
from jobs.bench.training_memory import Case, cases, estimate, model_config
from rayrl.preflight.model import model_shape


def test_the_estimated_parameters_are_the_models():
    config = model_config(Case(hidden_size=512, num_layers=2, zero_stage=0))
    with torch.device("meta"):
        num_parameters = sum(parameter.numel() for parameter in LlamaForCausalLM(config).parameters())
    assert model_shape(config.to_dict(), None).num_parameters == pytest.approx(num_parameters, rel=1e-3)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_every_case_is_estimated_at_every_stage(device):
    assert {case.zero_stage for case in cases(device)} == {0, 1, 2, 3}
    assert all(sum(estimate(case).values()) > 2**26 for case in cases(device))


def test_every_trainer_is_checked_at_every_stage():
    assert {f"{trainer}, ZeRO-{stage}" for trainer in TRAINERS for stage in range(4)} < CHECKS.keys()
