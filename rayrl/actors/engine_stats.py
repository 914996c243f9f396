"""vLLM's own metrics in Ray's Prometheus endpoint, as `ray_vllm_*`. Imported only where an engine starts."""

from typing import Any

from vllm.v1.metrics.ray_wrappers import RayPrometheusStatLogger


class EngineStats(RayPrometheusStatLogger):
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
