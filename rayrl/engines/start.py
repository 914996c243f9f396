"""What a vLLM engine is started with, and its start."""

from dataclasses import dataclass
from typing import Any

from rayrl.config import EngineConfig
from rayrl.metrics import prometheus
from rayrl.records import Checkpoint
from rayrl.runs.storage import local_folder

CPU_BATCHED_TOKENS = 8192
"""Tokens of one forward pass of a CPU engine; a context longer than this raises it."""


@dataclass(frozen=True, kw_only=True)
class EngineSpec:
    """What an engine is started with. The kind (`runner`) never changes during its life."""

    checkpoint: Checkpoint
    config: EngineConfig
    dtype: str
    max_model_len: int | None
    trust_remote_code: bool
    on_gpu: bool
    pooling: str | None = None
    """None is a generation engine; "mean" or "last" an embedding engine."""
    weight_transfer: str | None = None
    """vLLM's engine by which a trainer can send weights; None leaves the folder."""


def environment(config: EngineConfig, on_gpu: bool) -> dict[str, str]:
    """Environment of an engine's process.

    On CPU: threads set, and the model inside the core's process; vLLM's own worker process binds threads, and two bound
    engines share core 0.
    """
    variables = {"VLLM_LOGGING_LEVEL": "WARNING", "VLLM_NO_USAGE_STATS": "1", "TOKENIZERS_PARALLELISM": "false"}
    if not on_gpu:
        variables |= {"OMP_NUM_THREADS": str(config.threads), "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    return variables


def start_engine(spec: EngineSpec, name: str) -> Any:
    """Start an `AsyncLLM`. Takes 10-30 s.

    Args:
        spec: what it is started with.
        name: what vLLM's metrics call it (`model_name`): its fleet; empty is the model's path.
    """
    from vllm import AsyncEngineArgs
    from vllm.config import PoolerConfig, WeightTransferConfig
    from vllm.v1.engine.async_llm import AsyncLLM

    arguments: dict[str, Any] = {
        "model": local_folder(spec.checkpoint.path),
        "dtype": spec.dtype,
        "max_model_len": spec.max_model_len,
        "max_num_seqs": spec.config.max_num_seqs,
        "tensor_parallel_size": spec.config.tensor_parallel_size,
        "pipeline_parallel_size": spec.config.pipeline_parallel_size,
        "trust_remote_code": spec.trust_remote_code,
        "seed": 0,
        "disable_log_stats": True,  # vLLM's log lines; what they say is among the metrics
        "served_model_name": name or None,
    }
    if spec.on_gpu:
        arguments["gpu_memory_utilization"] = spec.config.gpu_memory_utilization
        if spec.config.num_ranks > 1:
            # In a placement group vLLM would start Ray actors of its own; this one holds all of the group's GPUs.
            arguments["distributed_executor_backend"] = "mp"
    else:
        # A prefill in chunks would rewind a seeded request's generator, which torch's CPU generator cannot do.
        arguments |= {
            "enforce_eager": True,
            "kv_cache_memory_bytes": spec.config.kv_cache_mb << 20,
            "enable_chunked_prefill": False,
            "max_num_batched_tokens": max(CPU_BATCHED_TOKENS, spec.max_model_len or 0),
        }
    if spec.weight_transfer is not None:
        arguments["weight_transfer_config"] = WeightTransferConfig(backend=spec.weight_transfer)
    if spec.pooling is not None:
        pooler = PoolerConfig(seq_pooling_type=spec.pooling.upper(), use_activation=False)  # type: ignore[arg-type]
        arguments |= {"runner": "pooling", "convert": "embed", "pooler_config": pooler}
    loggers: list[Any] = []
    if prometheus.connected():
        from rayrl.engines.vllm_metrics import EngineStats

        loggers = [EngineStats]
    return AsyncLLM.from_engine_args(AsyncEngineArgs(**(arguments | spec.config.engine_args)), stat_loggers=loggers)
