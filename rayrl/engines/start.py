"""Start of a vLLM engine: its specification, its process's environment, and its arguments."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rayrl.config import EngineConfig
from rayrl.errors import ConfigError
from rayrl.metrics import prometheus
from rayrl.records import Checkpoint
from rayrl.runs.guard import guard_this_process
from rayrl.runs.storage import local_folder

if TYPE_CHECKING:
    from vllm.v1.engine.async_llm import AsyncLLM
    from vllm.v1.metrics.loggers import StatLoggerFactory

CPU_BATCHED_TOKENS = 8192
"""Tokens in one forward pass of a CPU engine; a longer context raises it."""
WORKER_EXTENSION = "rayrl.engines.worker.WorkerExtension"
"""Class whose methods vLLM adds to its workers."""
NO_GPUS = {"CUDA_VISIBLE_DEVICES": ""}
"""Environment of a process that uses no GPU, also where the machine has some: Ray leaves them visible."""


@dataclass(frozen=True, kw_only=True)
class EngineSpec:
    """Specification of an engine. Its kind, generation or embedding, stays the same for its whole life."""

    checkpoint: Checkpoint
    """Weights that it starts with."""
    config: EngineConfig
    dtype: str
    max_model_len: int | None
    """Context in tokens; None is the model's own."""
    trust_remote_code: bool
    on_gpu: bool
    prompt_format: str = "auto"
    """Decides which token ends a response, see `rayrl.data.tokenizing.end_of_turn`."""
    pooling: str | None = None
    """None for a generation engine; "mean" or "last" for an embedding engine."""
    weight_transfer: str | None = None
    """vLLM's transfer backend over which a trainer sends weights; None if they come through folders only."""


def revision_of(checkpoint: Checkpoint) -> dict[str, str]:
    """Return the arguments of vLLM that pin a model of the hub; none for a folder."""
    if checkpoint.revision is None:
        return {}
    return {"revision": checkpoint.revision, "tokenizer_revision": checkpoint.revision}


def environment(config: EngineConfig, on_gpu: bool) -> dict[str, str]:
    """Return the environment variables of an engine's process."""
    variables = {"VLLM_LOGGING_LEVEL": "WARNING", "VLLM_NO_USAGE_STATS": "1", "TOKENIZERS_PARALLELISM": "false"}
    if not on_gpu:
        # On CPU the model runs inside the process of vLLM's core. A worker process of its own would bind its threads,
        # and two engines that bind threads share core 0.
        variables |= {"OMP_NUM_THREADS": str(config.threads), "VLLM_ENABLE_V1_MULTIPROCESSING": "0", **NO_GPUS}
    return variables


def engine_arguments(spec: EngineSpec, name: str) -> dict[str, Any]:
    """Return the arguments of vLLM's `AsyncEngineArgs`; the config's `engine_args` override all others.

    Args:
        spec: the engine's specification.
        name: label `model_name` of vLLM's metrics, the fleet's name; empty for the model's path.

    Raises:
        ConfigError: `engine_args` name a worker extension that cannot tell the sums of its weights.
    """
    from vllm.config import PoolerConfig, WeightTransferConfig

    arguments: dict[str, Any] = {
        "model": local_folder(spec.checkpoint.path),
        "dtype": spec.dtype,
        "max_model_len": spec.max_model_len,
        "max_num_seqs": spec.config.max_num_seqs,
        "tensor_parallel_size": spec.config.tensor_parallel_size,
        "pipeline_parallel_size": spec.config.pipeline_parallel_size,
        "trust_remote_code": spec.trust_remote_code,
        "seed": 0,
        "disable_log_stats": True,  # these are log lines; the same numbers are among the metrics
        "served_model_name": name or None,
        "worker_extension_cls": WORKER_EXTENSION,
    }
    arguments |= revision_of(spec.checkpoint)
    if spec.on_gpu:
        arguments["gpu_memory_utilization"] = spec.config.gpu_memory_utilization
        if spec.config.num_ranks > 1:
            # Inside a placement group vLLM would start Ray actors of its own. This actor already holds all GPUs of
            # its group, so plain processes use them.
            arguments["distributed_executor_backend"] = "mp"
    else:
        # A prefill in chunks would rewind the random generator of a seeded request, which torch cannot do on CPU. So
        # chunks are off, and then a whole context must fit into one batch.
        arguments |= {
            "enforce_eager": True,
            "kv_cache_memory_bytes": spec.config.kv_cache_mb << 20,
            "enable_chunked_prefill": False,
            "max_num_batched_tokens": max(CPU_BATCHED_TOKENS, spec.max_model_len or 0),
        }
    if spec.weight_transfer is not None:
        arguments["weight_transfer_config"] = WeightTransferConfig(backend=spec.weight_transfer)
    if spec.pooling is not None:
        # Without the activation a vector comes as it is; vLLM would normalise it.
        pooler = PoolerConfig(seq_pooling_type=spec.pooling.upper(), use_activation=False)  # type: ignore[arg-type]
        arguments |= {"runner": "pooling", "convert": "embed", "pooler_config": pooler}
    arguments |= spec.config.engine_args
    _check_extension(arguments["worker_extension_cls"])
    return arguments


def _check_extension(path: str) -> None:
    """Raise if the workers could not tell the sums of their weights."""
    if path == WORKER_EXTENSION:
        return  # not imported here: importing it prepares the process for a worker
    from vllm.utils.import_utils import resolve_obj_by_qualname

    if not hasattr(resolve_obj_by_qualname(path), "served_weight_sums"):
        raise ConfigError(
            f"engine_args.worker_extension_cls must derive from {WORKER_EXTENSION}, with which replicas prove their "
            f"weights, got {path}; derive from it"
        )


def start_engine(spec: EngineSpec, name: str) -> "AsyncLLM":
    """Start an engine, which takes 10 to 30 s; the arguments are those of `engine_arguments`."""
    from vllm import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    loggers: list[StatLoggerFactory] = []
    if prometheus.connected():
        # Imported here: it patches vLLM's Ray loggers, which nothing outside of Ray needs.
        from rayrl.engines.vllm_metrics import EngineStats

        loggers = [EngineStats]
    # vLLM's core does not notice that this process is killed while it starts, and would wait for ever.
    guard_this_process()
    arguments = AsyncEngineArgs(**engine_arguments(spec, name))
    return AsyncLLM.from_engine_args(arguments, stat_loggers=loggers)
