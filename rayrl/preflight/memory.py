"""Memory estimates of trainers and engines, before anything starts: one pure function per term.

The unit is bytes of one process: on GPUs the memory of its GPU, on CPUs its resident memory. Terms are upper bounds of
what exists at the same time, at the end of a forward pass: the weights, what an optimizer keeps, gradients of earlier
micro-batches, and the activations that the backward pass will read. jobs/bench/training_memory.py compares the sum with
measured peaks.

P is a number of parameters, w the bytes of one, N the number of workers. The sharded terms are those of ZeRO
(arXiv 1910.02054, section 5), with the buffers that DeepSpeed adds; activations are counted as in arXiv 2205.05198,
section 4, for layers without dropout, with gated MLPs and attention that keeps no matrix of scores.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product

from rayrl.algorithms.batching import LOGIT_BYTES
from rayrl.config import LoraConfig

GIB = 2**30
DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
TERMS = (
    *("weights", "gradients", "optimizer", "buffers", "value", "reference"),
    *("activations", "logits", "kv_cache", "process"),
)
"""Names of the terms, in the order in which the plan shows them."""
BUCKET_PARAMETERS = 500_000_000
"""Gradients that DeepSpeed reduces at once (`reduce_bucket_size`)."""
LIVE_PARAMETERS = 1_000_000_000
"""Whole parameters that ZeRO-3 keeps gathered at most (`stage3_max_live_parameters`)."""
PREFETCHED_PARAMETERS = 50_000_000
"""Parameters that ZeRO-3 gathers at once, ahead of their use (`stage3_prefetch_bucket_size`)."""
LOGIT_COPIES = 3
"""Matrices of a chunk of tokens x vocabulary in float32: logits, log-softmax and gradient."""
ENGINE_TOKENS = 8192
"""Tokens in one forward pass of an engine (`max_num_batched_tokens`)."""
CUDA_CONTEXT_BYTES = 3 * GIB // 4
"""CUDA's context with the kernels of torch and cuBLAS, on GPUs of compute capability 8.0 and 9.0."""
NCCL_BYTES = GIB // 2
"""Channels of NCCL between the workers of one training."""
NF4_BYTES = 0.5 + (1 + 4 / 256) / 64
"""A parameter in 4 bits, with its share of a scale of 8 bits per 64 of them, and of one of 32 bits per 256 scales
(QLoRA, arXiv 2305.14314, section 3)."""
CPU_PROCESS_BYTES = 3 * GIB // 4
"""A process without a model: Python, torch, transformers and DeepSpeed, or vLLM."""


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """Sizes of a causal language model."""

    num_parameters: int
    num_layers: int
    hidden_size: int
    intermediate_size: int
    """Of the MLP; of all experts that one token passes, if there are several."""
    attention_size: int
    """Heads times their size."""
    kv_size: int
    """Key-value heads times their size."""
    vocab_size: int


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Estimate of one process: bytes by term, and those of it that are in the node's memory instead of its GPU's."""

    terms: Mapping[str, float]
    host: float = 0.0

    @property
    def total(self) -> float:
        return sum(self.terms.values())


@dataclass(frozen=True, kw_only=True)
class RoleMemory:
    """Estimate of the processes of one role that exist at the same time."""

    role: str
    """"trainer", or the name of a fleet's table in the config."""
    num_processes: int
    memory: Memory
    least: float
    """Bytes without which none of them starts; what an engine takes beyond them is key-value cache."""
    share: float = 1.0
    """Of its GPU that such a process may take."""
    options: tuple[tuple[str, float], ...] = ()
    """Settings that would need less, each with the bytes of `least` under it."""


def weight_bytes(num_parameters: float, width: int, *, zero_stage: int, num_workers: int) -> float:
    """P w; under ZeRO-3 P w / N, and the parameters that are gathered for the layers at work.

    DeepSpeed lets go of gathered parameters only beyond LIVE_PARAMETERS, so that a small model is whole on every
    worker while it computes. Those that arrive are there twice: as the parts of all workers, and joined.
    """
    if zero_stage < 3:
        return num_parameters * width
    gathered = min(num_parameters, LIVE_PARAMETERS) + min(num_parameters, PREFETCHED_PARAMETERS)
    return num_parameters * width / num_workers + gathered * width


def gradient_bytes(num_trained: float, width: int, *, zero_stage: int, num_workers: int) -> float:
    """P w; from ZeRO-2 on P w / N (arXiv 1910.02054, section 5.2): the gradients of earlier micro-batches."""
    return num_trained * width / (num_workers if zero_stage >= 2 else 1)


def bucket_bytes(num_trained: float, width: int, *, zero_stage: int, on_gpu: bool) -> float:
    """B w under ZeRO-1, 2 B w from ZeRO-2 on, for buckets of B gradients on their way to the rank that keeps them.

    On a GPU a bucket takes its whole size; of a CPU's only what is written is resident, P at most.
    """
    if zero_stage == 0:
        return 0.0
    bucket = BUCKET_PARAMETERS if on_gpu else min(num_trained, BUCKET_PARAMETERS)
    return (1 if zero_stage == 1 else 2) * bucket * width


def step_bytes(num_trained: float, width: int, *, zero_stage: int, num_workers: int, on_gpu: bool) -> float:
    """4 P, from ZeRO-1 on 4 P / N: the gradients in float32 that the optimizer's step reads.

    float32 without ZeRO needs no copy of them. On a CPU torch's Adam makes two temporaries of the size of a tensor, and
    from ZeRO-1 on a worker's whole part is one tensor.
    """
    if zero_stage == 0:
        return 0.0 if width == 4 else 4 * num_trained
    return (1 if on_gpu else 3) * 4 * num_trained / num_workers


def optimizer_bytes(num_trained: float, width: int, *, zero_stage: int, num_workers: int) -> float:
    """K P, with two moments of Adam and a copy of the weights in float32: K = 12 (arXiv 1910.02054, section 3.1).

    From ZeRO-1 on K P / N. float32 without ZeRO needs no copy: K = 8.
    """
    if zero_stage == 0:
        return (8 if width == 4 else 12) * num_trained
    return 12 * num_trained / num_workers


def lora_parameters(shape: ModelShape, lora: LoraConfig) -> float:
    """Count r (in + out) for each linear layer: the parameters of low-rank adapters (arXiv 2106.09685, section 4.1).

    Named target modules are counted as all: their adapters are a small term in any case.
    """
    h, i, a, kv = shape.hidden_size, shape.intermediate_size, shape.attention_size, shape.kv_size
    sides = (h + a) + 2 * (h + kv) + (a + h) + 3 * (h + i)
    return lora.rank * sides * shape.num_layers


def linear_parameters(shape: ModelShape) -> float:
    """Count L (2 h a + 2 h k + 3 h i): the weights of the linear layers, the output head left out."""
    h = shape.hidden_size
    return shape.num_layers * h * (2 * shape.attention_size + 2 * shape.kv_size + 3 * shape.intermediate_size)


def layer_activation_bytes(shape: ModelShape, width: int) -> float:
    """Bytes per token that one layer keeps for its backward pass (after arXiv 2205.05198, section 4.1).

    2 h (4 + 2 w) for the two norms, each of which keeps its input in float32, its normalised input and its output;
    w (2 a + 2 k) for queries, attention's output, keys and values; 4 i w for the gate, its activation, the other branch
    and their product.
    """
    norms = 2 * shape.hidden_size * (4 + 2 * width)
    attention = width * (2 * shape.attention_size + 2 * shape.kv_size)
    mlp = 4 * shape.intermediate_size * width
    return norms + attention + mlp


def activation_bytes(shape: ModelShape, width: int, num_tokens: int, *, gradient_checkpointing: bool) -> float:
    """All layers' activations of a micro-batch; with checkpointing each layer's input h w, and one layer's activations.

    The second is full recomputation of arXiv 2205.05198, section 5.
    """
    layer = layer_activation_bytes(shape, width)
    if not gradient_checkpointing:
        return num_tokens * shape.num_layers * layer
    return num_tokens * (shape.num_layers * shape.hidden_size * width + layer)


def logit_bytes(vocab_size: int, num_tokens: int) -> float:
    """LOGIT_COPIES min(4 V t, LOGIT_BYTES): what the head's output takes, which is computed in chunks."""
    return LOGIT_COPIES * min(4 * vocab_size * num_tokens, LOGIT_BYTES)


def kv_cache_bytes(shape: ModelShape, width: int, num_tokens: int) -> float:
    """2 L k w for each token: keys and values of every layer."""
    return 2 * shape.num_layers * shape.kv_size * width * num_tokens


@dataclass(frozen=True, kw_only=True)
class TrainerSettings:
    """The settings of a training that its memory depends on, named as in `rayrl.config.training`."""

    num_workers: int
    zero_stage: int
    cpu_offload: bool
    gradient_checkpointing: bool
    lora: LoraConfig | None
    micro_batch_tokens: int
    gradient_width: int = 4
    """Bytes of a gradient of earlier micro-batches."""


@dataclass(frozen=True, kw_only=True)
class Networks:
    """Networks that one training holds beside the policy or reward model that it trains."""

    has_value: bool = False
    """PPO: a value network of the same size, trained with the policy."""
    has_reference: bool = False
    """PPO without adapters: a frozen M1, whole on every worker, and under ZeRO-3 sharded."""
    has_logits: bool = True
    """Whether the head over the vocabulary is computed; scalar heads need none."""


def trainer_memory(
    shape: ModelShape, settings: TrainerSettings, networks: Networks, *, width: int, on_gpu: bool
) -> Memory:
    """Estimate one training worker.

    Args:
        shape: the model that is trained.
        settings: sharding, offload, adapters, checkpointing, and tokens of a micro-batch.
        networks: what else is in the worker.
        width: bytes of a parameter.
        on_gpu: whether the worker has a GPU.
    """
    stage, num_workers = settings.zero_stage, settings.num_workers
    num_tokens = settings.micro_batch_tokens
    num_trained = lora_parameters(shape, settings.lora) if settings.lora else shape.num_parameters
    num_networks = 2 if networks.has_value else 1
    sharding = {"zero_stage": stage, "num_workers": num_workers}
    widths = {"width": width, "gradient_width": settings.gradient_width}
    states = state_bytes(shape.num_parameters, num_trained, **widths, **sharding)
    # One engine trains both networks, and gathers no more parameters for two of them.
    both = state_bytes(num_networks * shape.num_parameters, num_networks * num_trained, **widths, **sharding)
    if settings.lora is not None and settings.lora.quantization is not None:
        saved = linear_parameters(shape) * (width - NF4_BYTES)
        states["weights"] -= saved
        both["weights"] -= num_networks * saved
    host = 0.0
    if on_gpu and settings.cpu_offload and stage > 0:
        # The optimizer's gradients go with its state, and under ZeRO-3 so do the shards of the weights.
        host = both["optimizer"] + step_bytes(num_networks * num_trained, width, on_gpu=on_gpu, **sharding)
        states["optimizer"] = both["optimizer"] = 0.0
        if stage == 3:
            shard = shape.num_parameters * width / num_workers
            states["weights"] -= shard
            both["weights"] -= num_networks * shard
            host += num_networks * shard
    activations = activation_bytes(shape, width, num_tokens, gradient_checkpointing=settings.gradient_checkpointing)
    logits = logit_bytes(shape.vocab_size, num_tokens) if networks.has_logits else 0.0
    # The backward pass has let go of the activations when the optimizer's step begins. Before that, a GPU's bucket is
    # whole from the beginning, and a CPU's is filled meanwhile.
    freed = num_networks * activations + logits
    buckets = bucket_bytes(num_networks * num_trained, width, zero_stage=stage, on_gpu=on_gpu)
    step = step_bytes(num_networks * num_trained, width, on_gpu=on_gpu, **sharding)
    during_backward = buckets if on_gpu else buckets - freed
    terms = {
        **states,
        "buffers": max(0.0, during_backward, 0.0 if host else step - freed),
        "value": sum(both.values()) - sum(states.values()) + (num_networks - 1) * activations,
        "reference": weight_bytes(shape.num_parameters, width, **sharding) if networks.has_reference else 0.0,
        "activations": activations,
        "logits": logits,
        "process": process_bytes(on_gpu=on_gpu, num_workers=num_workers),
    }
    return Memory(terms=terms, host=host)


def state_bytes(
    num_parameters: float, num_trained: float, *, width: int, gradient_width: int, zero_stage: int, num_workers: int
) -> dict[str, float]:
    """Model states by term: weights, gradients and optimizer (arXiv 1910.02054, section 3.1)."""
    sharding = {"zero_stage": zero_stage, "num_workers": num_workers}
    return {
        "weights": weight_bytes(num_parameters, width, **sharding),
        "gradients": gradient_bytes(num_trained, gradient_width, **sharding),
        "optimizer": optimizer_bytes(num_trained, width, **sharding),
    }


def process_bytes(*, on_gpu: bool, num_workers: int = 1) -> float:
    """A process without a model: CUDA's context and NCCL's channels, or on a CPU the libraries."""
    if not on_gpu:
        return CPU_PROCESS_BYTES
    return CUDA_CONTEXT_BYTES + (NCCL_BYTES if num_workers > 1 else 0)


@dataclass(frozen=True, kw_only=True)
class EngineSettings:
    """The settings of an engine that its memory depends on, named as in `rayrl.config.engines`."""

    tensor_parallel_size: int
    pipeline_parallel_size: int
    gpu_memory_utilization: float
    kv_cache_mb: int
    max_model_len: int


def engine_memory(
    shape: ModelShape, settings: EngineSettings, *, width: int, gpu_bytes: float | None, on_gpu: bool
) -> Memory:
    """Estimate one rank of a vLLM engine.

    On a GPU the key-value cache is what is left of `gpu_memory_utilization` of the whole GPU; it must hold one sequence
    of the whole context, and is shown as that where the GPU's memory is not known.

    Args:
        shape: the model.
        settings: ranks, cache and context.
        width: bytes of a parameter.
        gpu_bytes: memory of the GPU; None is unknown.
        on_gpu: whether the engine has one.
    """
    num_ranks = settings.tensor_parallel_size * settings.pipeline_parallel_size
    terms = {
        "weights": shape.num_parameters * width / num_ranks,
        "activations": engine_activation_bytes(shape, width) / settings.tensor_parallel_size,
        "kv_cache": float(settings.kv_cache_mb << 20),
        "process": process_bytes(on_gpu=on_gpu),
    }
    if on_gpu:
        terms["kv_cache"] = kv_cache_bytes(shape, width, settings.max_model_len) / num_ranks
        if gpu_bytes is not None:
            left = settings.gpu_memory_utilization * gpu_bytes - sum(terms.values())
            terms["kv_cache"] += max(0.0, left)
    return Memory(terms=terms)


def engine_activation_bytes(shape: ModelShape, width: int) -> float:
    """4 h + 2 i, times w t, with t = ENGINE_TOKENS: one layer at a time, without anything kept for a backward pass."""
    return width * ENGINE_TOKENS * (4 * shape.hidden_size + 2 * shape.intermediate_size)


def most_share(fleets: Sequence[tuple[float, int, float]]) -> float:
    """Largest sum of memory shares that engines on one GPU may ask for.

    Ray puts replicas with fractions of a GPU together as long as the fractions add up to one at most. vLLM counts
    `gpu_memory_utilization` as a share of the whole GPU for each engine, and an engine that finds less free does not
    start.

    Args:
        fleets: the fraction of a GPU that a replica takes, the number of replicas, and the memory share of each.
    """
    # The tolerance keeps 1 / 0.1 = 9.99... from being 9 replicas on a GPU.
    most = [range((min(num, int(1 / fraction + 1e-9)) if fraction else num) + 1) for fraction, num, _ in fleets]
    sums = [
        sum(num * share for num, (_, _, share) in zip(nums, fleets, strict=True))
        for nums in product(*most)
        if sum(num * fraction for num, (fraction, _, _) in zip(nums, fleets, strict=True)) <= 1 + 1e-9
    ]
    return max(sums)
