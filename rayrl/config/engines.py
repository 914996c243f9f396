"""Settings of a fleet of engine replicas: their number, hardware and engine arguments."""

from typing import Any

from pydantic import Field, model_validator

from rayrl.config.table import Operation, Table


class EngineConfig(Table):
    """A fleet of vLLM replicas of one kind."""

    num_replicas: Operation[int] = Field(default=1, gt=0)
    """Replicas at the start of the fleet; and later, unless the next two settings differ from it."""
    min_replicas: Operation[int | None] = Field(default=None, gt=0)
    """Fewest replicas that the fleet shrinks to during the run; None is num_replicas."""
    max_replicas: Operation[int | None] = Field(default=None, gt=0)
    """Most replicas that the fleet grows to; None is num_replicas. The plan makes room for this many."""
    queue_s: Operation[float] = Field(default=10.0, ge=0)
    """Seconds for which calls have waited before replicas are added for them."""
    idle_s: Operation[float] = Field(default=300.0, ge=0)
    """Seconds without a call after which a replica above the minimum ends."""
    tensor_parallel_size: Operation[int] = Field(default=1, gt=0)
    """Processes that share each layer of one replica's model."""
    pipeline_parallel_size: Operation[int] = Field(default=1, gt=0)
    """Groups of consecutive layers that one replica's model is split into."""
    gpus_per_replica: Operation[float] = Field(default=1.0, ge=0)
    """Per tensor- and pipeline-parallel rank; a fraction puts several replicas on one GPU. Ignored on CPU machines."""
    cpus_per_replica: Operation[float] = Field(default=0.0, ge=0)
    """CPUs that Ray sets aside for a replica on a CPU machine. 0 fits beside anything; above 0, Ray starts only as many
    as fit, and an autoscaling cluster brings nodes for the rest."""
    gpu_memory_utilization: Operation[float] = Field(default=0.9, gt=0, le=1)
    """Share of a GPU's memory that one replica takes."""
    kv_cache_mb: Operation[int] = Field(default=128, gt=0)
    """Key-value cache of a CPU replica, MB."""
    threads: Operation[int] = Field(default=1, gt=0)
    """Compute threads of a CPU replica."""
    max_num_seqs: Operation[int] = Field(default=128, gt=0)
    """Sequences that a replica works on at once."""
    engine_args: dict[str, Any] = Field(default={})
    """Passed to vLLM as they are."""

    @model_validator(mode="after")
    def _ordered(self) -> "EngineConfig":
        if not self.least <= self.num_replicas <= self.most:
            raise ValueError(
                "min_replicas, num_replicas and max_replicas must not decrease in this order, got "
                f"{self.least}, {self.num_replicas} and {self.most}"
            )
        return self

    @property
    def least(self) -> int:
        """Fewest replicas at any time."""
        return self.num_replicas if self.min_replicas is None else self.min_replicas

    @property
    def most(self) -> int:
        """Most replicas at any time."""
        return self.num_replicas if self.max_replicas is None else self.max_replicas

    @property
    def num_ranks(self) -> int:
        """Processes of one replica that each hold a part of the model."""
        return self.tensor_parallel_size * self.pipeline_parallel_size

    @property
    def num_gpus(self) -> float:
        """GPUs of one replica, on a machine that has some."""
        return self.gpus_per_replica * self.num_ranks
