"""Memory estimates: each term against its equation, refusals on GPUs of a known size, and the plan's table."""

from dataclasses import replace
from pathlib import Path

import pytest

from rayrl.config import LoraConfig, load_config
from rayrl.errors import ConfigError, ResourceError
from rayrl.preflight import Cluster, check, render_plan
from rayrl.preflight.cluster import COMPUTE_CAPABILITY, GPU_BYTES, NodeType
from rayrl.preflight.gpus import facts_of_accelerator, parse
from rayrl.preflight.memory import (
    GIB,
    LIVE_PARAMETERS,
    PREFETCHED_PARAMETERS,
    EngineSettings,
    Networks,
    TrainerSettings,
    activation_bytes,
    bucket_bytes,
    engine_memory,
    gradient_bytes,
    kv_cache_bytes,
    layer_activation_bytes,
    logit_bytes,
    lora_parameters,
    most_share,
    optimizer_bytes,
    step_bytes,
    trainer_memory,
    weight_bytes,
)
from rayrl.preflight.model import ModelFacts, model_shape
from rayrl.preflight.stage_plans import plan_stages
from tests.preflight.trees import changed, refusal

QWEN_7B = {
    "hidden_size": 3584, "num_hidden_layers": 28, "intermediate_size": 18944, "num_attention_heads": 28,
    "num_key_value_heads": 4, "vocab_size": 152064, "max_position_embeddings": 32768, "dtype": "bfloat16",
}  # fmt: skip
QWEN_HALF = {
    "hidden_size": 896, "num_hidden_layers": 24, "intermediate_size": 4864, "num_attention_heads": 14,
    "num_key_value_heads": 2, "vocab_size": 151936, "tie_word_embeddings": True,
}  # fmt: skip
LLAMA_7B = {
    "hidden_size": 4096, "num_hidden_layers": 32, "intermediate_size": 11008, "num_attention_heads": 32,
    "vocab_size": 32000,
}  # fmt: skip
CONFIGS = Path(__file__).parents[2] / "jobs" / "configs"
SHAPE = model_shape(QWEN_7B, None)
SETTINGS = TrainerSettings(
    num_workers=8, zero_stage=3, cpu_offload=False, gradient_checkpointing=True, lora=None, micro_batch_tokens=8192
)


def gpus(num, gib=80, capability=9.0):
    return Cluster(nodes=({"CPU": 64.0, "GPU": float(num), GPU_BYTES: gib * GIB, COMPUTE_CAPABILITY: capability},))


def planned(tree, cluster):
    """The stages of a run whose policy has 7.6 billion parameters."""
    return plan_stages(changed(tree), cluster, ModelFacts(shape=SHAPE, max_model_len=32768)).stages


def test_sizes_are_read_from_a_models_config():
    assert SHAPE.num_parameters == pytest.approx(7.6e9, rel=0.01)
    assert (SHAPE.attention_size, SHAPE.kv_size) == (3584, 512)
    gpt2 = {"n_embd": 768, "n_layer": 12, "n_head": 12, "vocab_size": 50257, "tie_word_embeddings": True}
    assert model_shape(gpt2, 124_000_000).intermediate_size == 3072
    experts = QWEN_7B | {"moe_intermediate_size": 768, "num_experts_per_tok": 8}
    assert model_shape(experts, 1).intermediate_size == 8 * 768
    assert model_shape({"hidden_size": 3}, 1) is None


@pytest.mark.parametrize(
    ("stage", "weights", "gradients", "optimizer"),
    [(0, 2, 2, 12), (1, 2, 2, 3), (2, 2, 0.5, 3), (3, 0.5 + 2 + 1, 0.5, 3)],
)
def test_states_are_sharded_as_in_the_zero_paper(stage, weights, gradients, optimizer):
    """Figure 1 of arXiv 1910.02054 with 4 workers and K = 12; small models stay gathered under ZeRO-3."""
    sharding = {"zero_stage": stage, "num_workers": 4}
    assert weight_bytes(1e8, 2, **sharding) == weights * 1e8
    assert gradient_bytes(1e8, 2, **sharding) == gradients * 1e8
    assert optimizer_bytes(1e8, 2, **sharding) == optimizer * 1e8


def test_float32_needs_no_copy_without_zero():
    assert optimizer_bytes(10, 4, zero_stage=0, num_workers=1) == 80
    whole = {"zero_stage": 0, "num_workers": 1, "on_gpu": False}
    assert step_bytes(10, 4, **whole) == 0 and step_bytes(10, 2, **whole) == 40


def test_a_step_on_a_cpu_has_temporaries_of_a_workers_part():
    sharding = {"zero_stage": 1, "num_workers": 2}
    assert step_bytes(10, 2, on_gpu=True, **sharding) == 20
    assert step_bytes(10, 2, on_gpu=False, **sharding) == 60


def test_buckets_are_whole_on_gpus_only():
    assert bucket_bytes(10, 2, zero_stage=2, on_gpu=False) == 40
    assert bucket_bytes(10, 2, zero_stage=1, on_gpu=True) == 1e9
    assert bucket_bytes(10, 2, zero_stage=0, on_gpu=True) == 0


def test_activations_follow_from_the_layers():
    layer = layer_activation_bytes(SHAPE, 2)
    assert layer == 2 * 3584 * 8 + 2 * (2 * 3584 + 2 * 512) + 8 * 18944
    assert activation_bytes(SHAPE, 2, 10, gradient_checkpointing=False) == 280 * layer
    assert activation_bytes(SHAPE, 2, 10, gradient_checkpointing=True) == 10 * (28 * 3584 * 2 + layer)


def test_logits_stop_growing_with_the_micro_batch():
    assert logit_bytes(128_000, 8192) == logit_bytes(32_000, 8192) == logit_bytes(32_000, 1024)
    assert logit_bytes(1000, 512) == 2 * logit_bytes(1000, 256)


def test_adapters_are_trained_alone():
    assert lora_parameters(SHAPE, LoraConfig(rank=16)) == pytest.approx(40.4e6, rel=0.01)
    full = trainer_memory(SHAPE, SETTINGS, Networks(), width=2, on_gpu=True)
    adapters = trainer_memory(SHAPE, replace(SETTINGS, lora=LoraConfig()), Networks(), width=2, on_gpu=True)
    assert adapters.terms["optimizer"] < full.terms["optimizer"] / 100
    assert adapters.terms["weights"] == full.terms["weights"]


def test_ppo_holds_a_value_network_and_a_reference():
    alone = trainer_memory(SHAPE, SETTINGS, Networks(), width=2, on_gpu=True)
    both = trainer_memory(SHAPE, SETTINGS, Networks(has_value=True, has_reference=True), width=2, on_gpu=True)
    states = sum(alone.terms[name] for name in ("weights", "gradients", "optimizer", "activations"))
    gathered = 2 * (LIVE_PARAMETERS + PREFETCHED_PARAMETERS)  # once for both networks
    assert both.terms["value"] == pytest.approx(states - gathered)
    assert both.terms["reference"] == alone.terms["weights"], "sharded and gathered as the policy is"
    whole = replace(SETTINGS, zero_stage=1)
    both = trainer_memory(SHAPE, whole, Networks(has_value=True, has_reference=True), width=2, on_gpu=True)
    assert both.terms["reference"] == 2 * SHAPE.num_parameters


def test_offload_moves_the_optimizer_to_the_nodes_memory():
    kept = trainer_memory(SHAPE, SETTINGS, Networks(), width=2, on_gpu=True)
    moved = trainer_memory(SHAPE, replace(SETTINGS, cpu_offload=True), Networks(), width=2, on_gpu=True)
    assert moved.total < kept.total and moved.host > kept.terms["optimizer"] and kept.host == 0
    on_cpu = trainer_memory(SHAPE, replace(SETTINGS, cpu_offload=True), Networks(), width=2, on_gpu=False)
    assert on_cpu.host == 0


def test_an_engines_cache_is_what_is_left_of_its_share():
    settings = EngineSettings(
        tensor_parallel_size=1,
        pipeline_parallel_size=1,
        gpu_memory_utilization=0.9,
        kv_cache_mb=128,
        max_model_len=4096,
    )
    known = engine_memory(SHAPE, settings, width=2, gpu_bytes=80 * GIB, on_gpu=True)
    assert known.total == pytest.approx(72 * GIB)
    unknown = engine_memory(SHAPE, settings, width=2, gpu_bytes=None, on_gpu=True)
    assert unknown.terms["kv_cache"] == kv_cache_bytes(SHAPE, 2, 4096) == 2 * 28 * 512 * 2 * 4096
    halved = engine_memory(SHAPE, replace(settings, tensor_parallel_size=2), width=2, gpu_bytes=None, on_gpu=True)
    assert halved.terms["weights"] == unknown.terms["weights"] / 2


def test_shares_of_engines_on_one_gpu_add_up():
    assert most_share([]) == 0
    assert most_share([(0.5, 4, 0.45)]) == pytest.approx(0.9)
    assert most_share([(0.1, 20, 0.1)]) == pytest.approx(1.0)
    assert most_share([(0.5, 1, 0.5), (0.4, 1, 0.6)]) == pytest.approx(1.1)
    assert most_share([(0.6, 1, 0.5), (0.5, 1, 0.6)]) == pytest.approx(0.6), "they are never together"
    assert most_share([(0.0, 3, 0.3), (1.0, 1, 0.9)]) == pytest.approx(1.8), "0 is beside anything"


def test_a_training_that_no_gpu_holds_is_refused_with_what_would_help(tree):
    with pytest.raises(ResourceError) as refused:
        planned(tree, gpus(8))
    message = str(refused.value)
    assert message.startswith("stage fit_evaluator (1 worker(s), ZeRO-0) needs GPU memory: about ")
    assert "for each 1 x trainer: weights 14.2, gradients 28.4, optimizer 85.1" in message
    assert "and the largest GPU has 80.0 GiB; set " in message and "evaluator.lora = { rank = 16 }" in message
    large = {"num_workers": 8, "zero_stage": 3, "gradient_checkpointing": True}
    small = tree | {"evaluator": large, "dpo": large}
    assert {role.role for stage in planned(small, gpus(8)) for role in stage.memory} == {
        "trainer", "generators", "embedders",
    }  # fmt: skip
    planned(tree, Cluster(nodes=({"CPU": 64.0, "GPU": 8.0},)))  # what a GPU holds is not known everywhere


def test_an_engine_that_no_gpu_holds_is_refused_with_what_would_help(tree):
    with pytest.raises(ResourceError) as refused:
        planned(tree, gpus(8, gib=16))
    message = str(refused.value)
    assert message.startswith("stage generate (1 generator(s)) needs GPU memory: about 17.")
    assert "may take 14.4; set generators.tensor_parallel_size = 2 (" in message


def test_the_plan_shows_memory_term_by_term(tree):
    text = render_plan(check(changed(tree), cluster=gpus(8)))
    assert "\nestimated GiB of one GPU of 80.0 GiB, in bfloat16:\nmemory " in text
    assert "1 x trainer" in text and "1 x generators" in text
    assert "of one GPU, of unknown size" in render_plan(check(changed(tree), cluster={"CPU": 8.0, "GPU": 8.0}))
    assert "of one process, in float32" in render_plan(check(changed(tree), cluster={"CPU": 8.0}))


def test_a_model_without_sizes_is_planned_without_memory(tree):
    Path(tree["policy"]["path"], "config.json").write_text('{"max_position_embeddings": 1024}')
    assert "\nmemory: not estimated" in render_plan(check(changed(tree), cluster={"CPU": 8.0}))


def test_replicas_that_share_a_gpu_share_its_memory(rlp_tree):
    halves = {"generators": {"num_replicas": 2, "gpus_per_replica": 0.5}}
    message = refusal(ResourceError, changed(rlp_tree | halves), gpus(8))
    assert "shares of one GPU's memory that add up to 1.8" in message and "generators.gpu_memory_utilization" in message
    halves["generators"]["gpu_memory_utilization"] = 0.45
    check(changed(rlp_tree | halves), cluster=gpus(8))
    both = {"generators": {"gpus_per_replica": 0.5}, "embedders": {"gpus_per_replica": 0.5}}
    message = refusal(ResourceError, changed(rlp_tree | both), gpus(8))
    assert "embedders.gpu_memory_utilization and generators.gpu_memory_utilization" in message


def test_gpus_that_no_stage_uses_are_told(tree, rlp_tree):
    (warning,) = [w for w in check(changed(tree), cluster=gpus(8)).warnings if "GPUs" in w]
    assert warning.startswith("the cluster has 8 GPUs, and no stage uses more than 1 at a time; to use all: ")
    assert "dpo.num_workers=8" in warning and "generators.num_replicas=8" in warning
    (warning,) = [w for w in check(changed(rlp_tree), cluster=gpus(8)).warnings if "GPUs" in w]
    assert "ppo.num_workers=4" in warning and "embedders.num_replicas=2" in warning
    assert not [w for w in check(changed(tree), cluster=gpus(1)).warnings if "GPUs" in w]


@pytest.mark.parametrize(("device", "num_gpus", "on_gpu"), [("auto", 1, True), ("cpu", 1, False), ("gpu", 1, True)])
def test_the_device_decides_where_a_run_is(tree, device, num_gpus, on_gpu):
    plan = check(changed(tree, device=device), cluster=gpus(num_gpus))
    assert plan.on_gpu == on_gpu and plan.dtype == ("bfloat16" if on_gpu else "float32")
    assert not any(stage.num_gpus for stage in plan.stages) or on_gpu


def test_gpus_that_are_not_there_are_refused(tree):
    message = refusal(ResourceError, changed(tree, device="gpu"))
    assert message.startswith('device must be "cpu" or "auto" on a cluster without GPUs, got "gpu"')
    assert check(changed(tree, device="cpu"), cluster={"CPU": 2.0}).dtype == "float32"


def test_older_gpus_compute_in_float32(tree):
    assert check(changed(tree), cluster=gpus(1, gib=16, capability=7.5)).dtype == "float32"
    assert check(changed(tree), cluster=gpus(1)).dtype == "bfloat16"
    message = refusal(ConfigError, changed(tree, policy__dtype="bfloat16"), gpus(1, capability=7.0))
    assert message.startswith('policy.dtype must be "float32" or "auto" on GPUs of a compute capability below 8.0')


def test_facts_of_gpus_come_from_the_driver_or_the_accelerators_name():
    assert parse("81559, 9.0\n40960, 8.0\n") == {GPU_BYTES: 40960 * 2**20, COMPUTE_CAPABILITY: 8.0}
    assert parse("") == {}
    with pytest.raises(ValueError, match="could not convert"):
        parse("[N/A], [N/A]\n")
    assert facts_of_accelerator({"accelerator_type:T4": 1.0})[COMPUTE_CAPABILITY] == 7.5
    assert facts_of_accelerator({"accelerator_type:A100": 1.0}) == {}, "of 40 or 80 GB"
    kind = NodeType(resources={"GPU": 8.0, GPU_BYTES: 2.0}, most=2)
    assert Cluster(nodes=({"CPU": 1.0},), node_types=(kind,)).gpu_bytes() == 2.0
    assert Cluster(nodes=({"GPU": 1.0},), node_types=(kind,)).gpu_bytes() is None


def load_shipped(name, *overrides):
    return load_config(CONFIGS / f"{name}.toml", list(overrides))


ADAPTERS = ("dpo.lora={rank=16}", "evaluator.lora={rank=16}")


@pytest.mark.parametrize("overrides", [(), ADAPTERS], ids=["full", "lora"])
@pytest.mark.parametrize(
    ("name", "sizes", "cluster"),
    [("qwen_1gpu", QWEN_HALF, gpus(1, gib=24)), ("qwen_8gpu", QWEN_7B, gpus(8)), ("llama_8gpu", LLAMA_7B, gpus(8))],
)
def test_the_shipped_configs_fit_their_gpus(name, sizes, cluster, overrides):
    config = load_shipped(name, *overrides)
    model = ModelFacts(shape=model_shape(sizes, None), max_model_len=config.policy.max_model_len)
    stages = plan_stages(config, cluster, model).stages
    assert max(stage.num_gpus for stage in stages) == cluster.has("GPU")
    assert all(role.least < role.share * cluster.gpu_bytes() for stage in stages for role in stage.memory)


def test_the_papers_ppo_fits_eight_gpus():
    config = load_shipped("rlp_alpacafarm")
    stages = plan_stages(config, gpus(8), ModelFacts(shape=model_shape(LLAMA_7B, None), max_model_len=512)).stages
    assert [stage.num_gpus for stage in stages if stage.name == "ppo"] == [8]


@pytest.mark.parametrize("name", ["quickstart", "rlp_quickstart"])
def test_the_quickstarts_run_on_cpus_everywhere(name, tmp_path):
    plan = check(load_shipped(name, f"run_dir={tmp_path / 'run'}"), cluster=gpus(8))
    assert not plan.on_gpu and plan.dtype == "float32" and not any(stage.num_gpus for stage in plan.stages)
