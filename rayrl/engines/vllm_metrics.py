"""vLLM's own metrics in Ray's Prometheus endpoint, as `ray_vllm_*`. Imported only where an engine starts."""

from typing import Any

from ray.util import metrics
from vllm.v1.metrics import ray_wrappers

# Where Ray Serve cannot be imported, of which it only wants a Serve replica's name, vLLM does without Ray's metrics.
ray_wrappers.ray_metrics = metrics  # pyright: ignore[reportPrivateImportUsage]


class EngineStats(ray_wrappers.RayPrometheusStatLogger):
    """vLLM's logger for Ray, but for the one histogram that is written once per token.

    Ray's agent repeats every observation of a histogram in Python, which at thousands of tokens a second is much work.
    """

    def __init__(self, vllm_config: Any, engine_indexes: list[int] | None = None):
        super().__init__(vllm_config, engine_indexes)
        self.histogram_inter_token_latency = dict.fromkeys(self.engine_indexes, Unmeasured())


class Unmeasured:
    """A histogram that keeps nothing."""

    def observe(self, amount: float) -> None:
        """Forget it."""
