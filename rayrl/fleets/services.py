"""What a run keeps alive between its stages: its fleets. Started when first needed, once."""

import dataclasses
import logging
import time
from typing import Any

import ray
from ray.exceptions import RayError

from rayrl.config import EngineConfig, RunConfig, SpgConfig
from rayrl.engines.embedder import Embedder
from rayrl.engines.entailment import MAX_CONCURRENCY, EntailmentModel, EntailmentSpec
from rayrl.engines.generator import Generator
from rayrl.engines.vllm_engine import EngineSpec, ServedEngine
from rayrl.errors import RayRLError
from rayrl.fleets.control import Driver
from rayrl.fleets.fleet import Fleet, start_fleet, start_replicas
from rayrl.fleets.replicas import Replicas
from rayrl.models.mnli import label_order
from rayrl.records import Checkpoint
from rayrl.runs.run import Run

logger = logging.getLogger(__name__)

STATUS_S = 30.0
"""For what the replicas of a fleet that is to end say of themselves."""


class Services:
    """The run's long-lived actors, and what the hardware decides: device and dtype.

    Args:
        run: whose.
        mode: "overlap" or "alternate".
        reference: "generation" or "pass".
        on_gpu: whether engines and training take GPUs, which may be still to come; None is whether there are any now.
        control: the driver's end of the control, by which the fleets are resized by hand; None is nobody's hand.
    """

    def __init__(
        self, run: Run, *, mode: str, reference: str, on_gpu: bool | None = None, control: Driver | None = None
    ):
        self.run = run
        self._control = control
        self.mode = mode
        """"overlap" or "alternate"."""
        self.reference = reference
        """Where DPO's reference log-probabilities come from: "generation" or "pass"."""
        self.on_gpu = ray.cluster_resources().get("GPU", 0) > 0 if on_gpu is None else on_gpu
        self.dtype = resolve_dtype(run.config, self.on_gpu)
        self._fleets: dict[str, Fleet] = {}
        self._timed: set[str] = set()

    def generators(self, checkpoint: Checkpoint) -> Fleet:
        """The generation fleet; `checkpoint` is what its engines start with if it is not up yet."""
        return self._fleet("generators", Generator, self.run.config.generators, checkpoint, pooling=None)

    def embedders(self, checkpoint: Checkpoint, pooling: str) -> Fleet:
        """The embedding fleet of the policy's architecture that pools this way: selection and scalar evaluators."""
        return self._fleet(f"embedders-{pooling}", Embedder, self.run.config.embedders, checkpoint, pooling=pooling)

    def sentence_embedders(self, checkpoint: Checkpoint, pooling: str) -> Fleet:
        """The fleet of a sentence-embedding model: it serves the selection or the clustering."""
        name = f"sentences-{checkpoint.version}-{pooling}"
        return self._fleet(name, Embedder, self.run.config.embedders, checkpoint, pooling=pooling)

    def entailment(self, config: SpgConfig) -> Fleet:
        """The fleet of the entailment model; a replica has an embedder's threads, or its share of a GPU."""
        name = "entailment"
        if name not in self._fleets:
            if self.mode == "alternate":
                self.release()
            hardware = self.run.config.embedders
            spec = EntailmentSpec(
                path=config.entailment_model,
                max_tokens=config.max_tokens,
                threads=hardware.threads,
                on_gpu=self.on_gpu,
            )
            self._fleets[name] = start_entailment(
                f"{self.run.config.name}-{name}",
                spec,
                num_replicas=config.num_replicas,
                num_gpus=hardware.gpus_per_replica,
            )
        return self._shown("entailment", self._fleets[name])

    def warm(self, m1: Checkpoint) -> None:
        """Start both kinds of engine now, so that they come up side by side."""
        if self.mode == "alternate":
            return
        config = self.run.config
        needed = {"generate", "select", "evaluate"} - {s for s in self.run.stages() if s != "pool"}
        if "generate" in needed or "evaluate" in needed:
            self.generators(m1)
        select = config.select
        embeds = select.strategy == "k_center" and select.embedder == "policy" and config.labels != "expert"
        if "select" in needed and embeds:
            self.embedders(m1, config.select.pooling)

    def ready(self, fleet: Fleet) -> Fleet:
        """Wait until a fleet's engines are up, and note how long each took."""
        started = time.monotonic()
        statuses = fleet.wait_ready()
        if fleet.name not in self._timed:
            self._timed.add(fleet.name)
            for status in statuses:
                self.run.record_time(f"engine:{fleet.name}", status["start_s"], ended_at=status["started_at"])
            logger.info("%s: %d ready after %.1f s", fleet.name, len(statuses), time.monotonic() - started)
        return fleet

    def release(self) -> None:
        """Stop the fleets, for a training that needs their GPUs (mode `alternate`), or at the end."""
        for name, fleet in self._fleets.items():
            try:
                for status in fleet.statuses(fleet.hold_ready(), STATUS_S):
                    for seconds in status["swaps_s"]:
                        self.run.record_time(f"swap:{name}", seconds)
            except (RayError, RayRLError) as error:
                logger.warning("%s: how long its swaps took is not known: %s", fleet.name, error)
            finally:
                fleet.stop()
        self._timed -= {fleet.name for fleet in self._fleets.values()}
        self._fleets.clear()

    def retire(self, fleet: Fleet) -> None:
        """Stop a fleet that has done its work."""
        self._fleets = {name: kept for name, kept in self._fleets.items() if kept is not fleet}
        self._timed.discard(fleet.name)
        fleet.stop()

    def stop(self) -> None:
        """Stop everything at once, whatever it is doing."""
        for fleet in self._fleets.values():
            fleet.stop()
        self._fleets.clear()

    def _fleet(
        self,
        name: str,
        engine: type[ServedEngine],
        config: EngineConfig,
        checkpoint: Checkpoint,
        *,
        pooling: str | None,
    ) -> Fleet:
        if name not in self._fleets:
            if self.mode == "alternate":
                self.release()
            spec = EngineSpec(
                checkpoint=checkpoint,
                config=config,
                dtype=self.dtype,
                max_model_len=None if name.startswith("sentences") else self.run.config.policy.max_model_len,
                trust_remote_code=self.run.config.policy.trust_remote_code,
                on_gpu=self.on_gpu,
            )
            trained = name == "generators" and self.run.config.pipeline == "rlp"
            way = "nccl" if trained and self.run.config.ppo.weight_transfer == "nccl" else None
            spec = dataclasses.replace(spec, pooling=pooling, weight_transfer=way)
            self._fleets[name] = start_fleet(f"{self.run.config.name}-{name}", engine, spec)
        return self._shown("generators" if pooling is None else "embedders", self._fleets[name])

    def _shown(self, role: str, fleet: Fleet) -> Fleet:
        """Let an operator see the fleet, and give it the size that was asked for by hand before it was up."""
        if self._control is not None:
            self._control.show(role, fleet.name, fleet.router)
        return fleet


def resolve_dtype(config: RunConfig, on_gpu: bool) -> str:
    """bfloat16 where the accelerator has it, unless the config says otherwise."""
    if config.policy.dtype != "auto":
        return config.policy.dtype
    return "bfloat16" if on_gpu else "float32"


def start_entailment(name: str, spec: EntailmentSpec, *, num_replicas: int, num_gpus: float) -> Fleet:
    """Start a fleet of replicas, each with so much of a GPU; refuses a model with other labels before it does.

    Raises:
        ConfigError: there is no such model, or its labels are not MNLI's.
    """
    label_order(spec.path)
    variables = {"OMP_NUM_THREADS": str(spec.threads), "TOKENIZERS_PARALLELISM": "false"}
    options: dict[str, Any] = {"num_gpus": num_gpus if spec.on_gpu else 0, "runtime_env": {"env_vars": variables}}
    options["max_concurrency"] = MAX_CONCURRENCY
    return start_replicas(name, Replicas(replica=EntailmentModel, spec=spec, options=options), num_replicas)
