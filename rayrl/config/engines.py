"""The fleets, and what is sampled on them."""

from typing import Any, Literal

from pydantic import Field

from rayrl.config.table import Table


class EngineConfig(Table):
    """A fleet of vLLM replicas of one kind."""

    num_replicas: int = Field(default=1, gt=0)
    tensor_parallel_size: int = Field(default=1, gt=0)
    gpus_per_replica: float = Field(default=1.0, ge=0)
    """Per tensor-parallel rank; a fraction puts several replicas on one GPU. Ignored on CPU machines."""
    gpu_memory_utilization: float = Field(default=0.9, gt=0, le=1)
    kv_cache_mb: int = Field(default=128, gt=0)
    """Key-value cache of a CPU replica."""
    threads: int = Field(default=1, gt=0)
    """Compute threads of a CPU replica."""
    max_num_seqs: int = Field(default=128, gt=0)
    engine_args: dict[str, Any] = Field(default={})
    """Passed to vLLM as they are."""


class GenerateConfig(Table):
    """On-policy sampling: k responses for each prompt."""

    source: Literal["policy", "seed"] = "policy"
    """"seed" is the off-policy control: the seed data's own responses are queried instead of M1's."""
    k: int = Field(default=4, gt=0)
    temperature: float = Field(default=0.7, ge=0)
    top_p: float = Field(default=0.9, gt=0, le=1)
    top_k: int = Field(default=0, ge=0)
    """0 is off."""
    max_tokens: int = Field(default=512, gt=0)
    stop: list[str] = Field(default=[])
    block_size: int = Field(default=64, gt=0)
    """Prompts per block: the unit of work, of memoisation and of resume."""
