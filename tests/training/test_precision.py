"""Every trainer in bfloat16, at every ZeRO stage, with adapters and without: train, resume, export."""

import pytest
import torch

from rayrl.config import TrainingConfig
from rayrl.training.deepspeed_engine import new_optimizer, schedule, zero_config
from tests.tiny_models import make_tiny_model
from tests.training.two_processes import Combination, train_all

TRAINERS = ("sft", "dpo", "evaluator", "reward_model", "views", "ppo")
COMBINATIONS = [
    Combination(trainer, zero_stage, lora) for trainer in TRAINERS for zero_stage in range(4) for lora in (False, True)
]
COMBINATIONS += [
    # Both trainers that have heads beside their models; stage 0 has nothing to move to the CPU.
    Combination(trainer, zero_stage, lora, settings=settings)
    for trainer, lora in (("reward_model", False), ("ppo", True))
    for zero_stage, settings in (
        (0, {"gradient_checkpointing": True}),
        (2, {"cpu_offload": True}),
        (3, {"cpu_offload": True, "gradient_checkpointing": True}),
    )
]
COMBINATIONS += [
    Combination("sft", 0, settings={"grad_accum_dtype": "bfloat16"}),
    Combination("sft", 3, settings={"deepspeed": {"zero_optimization": {"reduce_bucket_size": 100_000}}}),
    Combination("views", 3, dtype="float32"),
    Combination("dpo", 2, settings={"lora": {"rank": 4, "alpha": 8, "quantization": "nf4"}}),
    Combination("ppo", 1, settings={"lora": {"rank": 4, "alpha": 8, "quantization": "nf4"}}),
]
CHANGED = [
    # The layout of the second start is another one. Each trainer has its own parameters: heads, adapters, two networks.
    Combination("sft", 3, lora=True, dtype="float32", then={"zero_stage": 0}),
    Combination("reward_model", 0, dtype="float32", then={"zero_stage": 2, "cpu_offload": True}),
    Combination("views", 0, dtype="float32", then={"zero_stage": 3}),
    Combination("ppo", 2, dtype="float32", settings={"value_learning_rate": 2e-3}, then={"zero_stage": 3}),
    Combination("ppo", 3, lora=True, dtype="float32", then={"zero_stage": 1}),
]
COMBINATIONS += CHANGED


assert len({combination.name for combination in COMBINATIONS}) == len(COMBINATIONS), "each has a folder of its own"


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("combinations")
    model = make_tiny_model(folder / "model")
    return train_all(folder, str(model), COMBINATIONS)


@pytest.mark.parametrize("combination", COMBINATIONS, ids=lambda combination: combination.name)
def test_it_trains_goes_on_from_its_checkpoint_and_exports_what_it_trained(results, combination):
    result = results[combination.name]
    assert "error" not in result, result["error"]
    assert result["changed"] > 1e-4
    # The second half of the training, from the checkpoint of the first half, is the undisturbed one to the last bit:
    # weights, moments, schedule and gradients are those of the step. Another layout adds up in another order.
    assert result["resumed"] <= (1e-5 if combination in CHANGED else 0)
    assert result["dtypes"] == [f"torch.{combination.dtype}"]
    assert {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"} <= set(result["files"])
    has_head = combination.trainer in ("evaluator", "reward_model", "views")
    assert ("head" in result["files"]) == has_head
    assert (result["head"] > 0) == has_head


@pytest.mark.parametrize("trainer", set(TRAINERS) - {"ppo"})
@pytest.mark.parametrize("lora", [False, True])
def test_the_loss_of_the_first_step_is_the_same_at_every_stage(results, trainer, lora):
    losses = [results[Combination(trainer, stage, lora).name]["losses"][0] for stage in range(4)]
    assert losses == pytest.approx([losses[0]] * 4, abs=0.02)  # ZeRO-3 multiplies in another order


@pytest.mark.parametrize(
    ("dtype", "settings", "stage", "data_types"),
    [
        (torch.float32, {"zero_stage": 0}, 0, None),
        (torch.bfloat16, {"zero_stage": 0}, 1, {"grad_accum_dtype": "fp32"}),
        (torch.bfloat16, {"zero_stage": 3}, 3, {"grad_accum_dtype": "fp32"}),
        (torch.bfloat16, {"zero_stage": 0, "grad_accum_dtype": "bfloat16"}, 0, None),
        (torch.bfloat16, {"deepspeed": {"data_types": {"buffer_dtype": "fp32"}}}, 1, {"buffer_dtype": "fp32"}),
    ],
)
def test_gradients_are_added_up_in_float32_unless_the_setting_says_otherwise(dtype, settings, stage, data_types):
    config = zero_config(TrainingConfig(**settings), dtype)
    assert config["zero_optimization"]["stage"] == stage
    assert (data_types or {}).items() <= config.get("data_types", {}).items()
    assert "data_types" in config or data_types is None


def test_the_settings_passed_through_join_those_of_the_same_table():
    passed = {"zero_optimization": {"reduce_bucket_size": 1000}, "wall_clock_breakdown": True}
    config = zero_config(TrainingConfig(zero_stage=2, deepspeed=passed), torch.float32)
    assert config["zero_optimization"] == {"stage": 2, "reduce_bucket_size": 1000}
    assert config["wall_clock_breakdown"] is True


def test_the_optimizer_has_the_settings_and_needs_no_compiler():
    training = TrainingConfig(adam_betas=(0.8, 0.95), adam_eps=1e-6, weight_decay=0.1, learning_rate=1e-3)
    optimizer = new_optimizer([torch.nn.Parameter(torch.ones(2))], training)
    assert type(optimizer) is torch.optim.AdamW
    chosen = {name: optimizer.defaults[name] for name in ("lr", "betas", "eps", "weight_decay", "fused")}
    assert chosen == {"lr": 1e-3, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.1, "fused": True}


@pytest.mark.parametrize("decay", ["linear", "cosine"])
def test_the_schedule_ends_at_its_smallest_share(decay):
    training = TrainingConfig(schedule=decay, warmup_ratio=0.0, min_learning_rate_share=0.25)
    assert [schedule(step, 10, training) for step in (0, 10, 12)] == pytest.approx([1, 0.25, 0.25])
