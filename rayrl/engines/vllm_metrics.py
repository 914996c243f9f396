"""vLLM's own metrics in Ray's Prometheus endpoint, as `ray_vllm_*`. Import it only where an engine starts."""

from ray.util import metrics
from vllm.config import VllmConfig
from vllm.v1.metrics import ray_wrappers

# vLLM imports Ray's metrics together with Ray Serve, from which it needs only the name of a Serve replica. Where Ray
# Serve cannot be imported, vLLM leaves `ray_metrics` empty and its Ray logger would fail.
ray_wrappers.ray_metrics = metrics  # pyright: ignore[reportPrivateImportUsage]


class EngineStats(ray_wrappers.RayPrometheusStatLogger):
    """vLLM's logger for Ray without the histogram that is written once per token.

    Ray's agent replays every observation of a histogram in Python, too slow at thousands of tokens a second.
    """

    def __init__(self, vllm_config: VllmConfig, engine_indexes: list[int] | None = None):
        super().__init__(vllm_config, engine_indexes)
        self.histogram_inter_token_latency = dict.fromkeys(self.engine_indexes, NullHistogram())


class NullHistogram:
    """Histogram that discards its observations."""

    def observe(self, amount: float) -> None:
        """Discard the observation."""
