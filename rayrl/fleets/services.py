"""Services of a run: the fleets that stay alive between its stages, each started once, when it is first needed.

Stages ask for a fleet and wait for it with `ready`. A fleet may be shared by several stages: one embedding fleet serves
the selection and a scalar evaluator if both pool the same way. In mode "alternate" only one fleet is alive at a time,
and none during a training. Resources are checked before the run, in `rayrl.preflight`, and not here.
"""

import logging
import time
from typing import ClassVar

import ray
from ray.exceptions import RayError

from rayrl.config import SpgConfig
from rayrl.engines.embedder import Embedder
from rayrl.engines.entailment import MAX_CONCURRENCY, EntailmentModel, EntailmentSpec
from rayrl.engines.generator import Generator
from rayrl.engines.serving import Serving
from rayrl.engines.start import NO_GPUS, EngineSpec
from rayrl.errors import RayRLError
from rayrl.fleets.control import Driver
from rayrl.fleets.fleet import Fleet, start_fleet, start_replicas, stop_fleets
from rayrl.fleets.replicas import Replicas
from rayrl.models.mnli import label_order
from rayrl.records import Checkpoint
from rayrl.runs.run import Run
from rayrl.runs.stage_table import EVALUATE, GENERATE, GENERATORS, SELECT, FleetUse, policy_embedders

logger = logging.getLogger(__name__)

STATUS_TIMEOUT_S = 30.0
"""Longest wait for the reports of a fleet's replicas before the fleet is stopped."""


class Services:
    """Fleets of one run, and the device and dtype that its engines and trainings use.

    Args:
        run: the run.
        mode: "overlap" keeps fleets alive during trainings; "alternate" stops them for each training.
        reference: source of DPO's reference log-probabilities, "generation" or "pass" (a pass before the first step).
        on_gpu: whether engines and trainings take GPUs, which an autoscaler may still bring; None looks at the cluster.
        dtype: of engines and trainings; None follows the device.
        control: the driver's side of the run's control, for operators to see and resize the fleets; None for a run
            without a control.
    """

    generator_class: ClassVar[type[Serving]] = Generator
    embedder_class: ClassVar[type[Serving]] = Embedder

    def __init__(
        self,
        run: Run,
        *,
        mode: str,
        reference: str,
        on_gpu: bool | None = None,
        dtype: str | None = None,
        control: Driver | None = None,
    ):
        self.run = run
        self.mode = mode
        self.reference = reference
        # One answer for the whole run: nodes may come and go, but engines and trainings must agree on device and dtype.
        self.on_gpu = ray.cluster_resources().get("GPU", 0) > 0 if on_gpu is None else on_gpu
        self.dtype = dtype or run.config.policy.resolved_dtype(on_gpu=self.on_gpu)
        self._control = control
        self._fleets: dict[str, Fleet] = {}
        self._timed: set[str] = set()

    def fleet(self, use: FleetUse, checkpoint: Checkpoint) -> Fleet:
        """Return the fleet of this use, and start it if it is not up.

        Args:
            use: role, model and pooling of the fleet, as in the stage table; of generators or embedders.
            checkpoint: the weights with which engines start. A fleet that is up keeps the weights that it has, and
                swaps when a request names others.
        """
        name = fleet_name(use, checkpoint)
        if name not in self._fleets:
            self._make_room()
            engine = self.generator_class if use.role == "generators" else self.embedder_class
            self._fleets[name] = start_fleet(f"{self.run.config.name}-{name}", engine, self._spec(use, checkpoint))
        return self._shown(use.role, self._fleets[name])

    def generators(self, checkpoint: Checkpoint) -> Fleet:
        """Return the generation fleet; it serves a generative evaluator too."""
        return self.fleet(GENERATORS, checkpoint)

    def embedders(self, checkpoint: Checkpoint, pooling: str) -> Fleet:
        """Return the embedding fleet of the policy's architecture with this pooling."""
        return self.fleet(policy_embedders(pooling), checkpoint)

    def sentence_embedders(self, checkpoint: Checkpoint, pooling: str) -> Fleet:
        """Return the fleet of a sentence-embedding model, for the selection or the clustering."""
        return self.fleet(FleetUse(role="embedders", model=checkpoint.path, pooling=pooling), checkpoint)

    def entailment(self, config: SpgConfig) -> Fleet:
        """Return the fleet of the entailment model.

        The config has no hardware for it: a replica takes an embedder's threads, or its share of a GPU.
        """
        name = "entailment"
        if name not in self._fleets:
            self._make_room()
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
        """Start the fleets of M1 that the run's first round still needs, so that their engines come up side by side.

        A fleet of another model starts with the stage that needs it, and so do all fleets in mode "alternate".
        """
        if self.mode == "alternate":
            return
        uses: list[FleetUse] = []
        if self.run.manifest(GENERATE) is None or self.run.manifest(EVALUATE) is None:
            uses.append(GENERATORS)
        if self.run.manifest(SELECT) is None:
            uses += [use for use in SELECT.fleets(self.run.config) if use.model == "policy"]
        for use in uses:
            self.fleet(use, m1)

    def ready(self, fleet: Fleet) -> Fleet:
        """Wait until a fleet has its minimum of ready replicas, and record how long each took to start."""
        started = time.monotonic()
        statuses = fleet.wait_ready()
        if fleet.name not in self._timed:  # several stages wait for the same fleet
            self._timed.add(fleet.name)
            for status in statuses:
                self.run.record_time(f"engine:{fleet.name}", status["start_s"], ended_at=status["started_at"])
            logger.info("%s: %d ready after %.1f s", fleet.name, len(statuses), time.monotonic() - started)
        return fleet

    def release(self) -> None:
        """Stop all fleets, for a training that needs their GPUs or at the end, and record how long their swaps took."""
        for name, fleet in self._fleets.items():
            try:
                for status in fleet.statuses(fleet.hold_ready(), STATUS_TIMEOUT_S):
                    for seconds in status["swaps_s"]:
                        self.run.record_time(f"swap:{name}", seconds)
            except (RayError, RayRLError) as error:  # a missing time is no reason for a run to fail
                logger.warning("%s: how long its swaps took is not known: %s", fleet.name, error)
            finally:
                fleet.stop()
        self._timed -= {fleet.name for fleet in self._fleets.values()}
        self._fleets.clear()

    def retire(self, fleet: Fleet) -> None:
        """Stop a fleet that has done its work."""
        # Forgotten before it is stopped: a later request starts a new one, even if stopping fails.
        self._fleets = {name: kept for name, kept in self._fleets.items() if kept is not fleet}
        self._timed.discard(fleet.name)
        fleet.stop()

    def stop(self) -> None:
        """Stop all fleets at once, whatever they are doing."""
        stop_fleets(self._fleets.values())
        self._fleets.clear()

    def _make_room(self) -> None:
        """Stop the other fleets before one is started, in mode "alternate"."""
        if self.mode == "alternate":
            self.release()

    def _spec(self, use: FleetUse, checkpoint: Checkpoint) -> EngineSpec:
        config = self.run.config
        is_policy = use.model == "policy"
        # Only the policy that PPO trains is sent straight from the trainer's memory.
        is_trained_by_ppo = use.role == "generators" and config.pipeline == "rlp"
        uses_nccl = is_trained_by_ppo and config.ppo.weight_transfer == "nccl"
        return EngineSpec(
            checkpoint=checkpoint,
            config=config.generators if use.role == "generators" else config.embedders,
            dtype=self.dtype,
            max_model_len=config.policy.max_model_len if is_policy else None,
            trust_remote_code=config.policy.trust_remote_code,
            on_gpu=self.on_gpu,
            prompt_format=config.policy.prompt_format,
            pooling=use.pooling,
            weight_transfer="nccl" if uses_nccl else None,
        )

    def _shown(self, role: str, fleet: Fleet) -> Fleet:
        """Register the fleet with the control, which also gives it the size that an operator gave its role before."""
        if self._control is not None:
            self._control.show(role, fleet.name, fleet.router)
        return fleet


def fleet_name(use: FleetUse, checkpoint: Checkpoint) -> str:
    """Name a fleet of engines within its run; its actors, metrics and times carry this name."""
    if use.role != "embedders":
        return use.role
    if use.model == "policy":
        return f"embedders-{use.pooling}"
    return f"sentences-{checkpoint.version}-{use.pooling}"


def start_entailment(name: str, spec: EntailmentSpec, *, num_replicas: int, num_gpus: float) -> Fleet:
    """Start a fleet of entailment replicas, after checking the labels of their model.

    Args:
        name: name of the fleet.
        spec: what each replica starts with.
        num_replicas: their number.
        num_gpus: share of a GPU that each takes, if it runs on one.

    Raises:
        ConfigError: there is no such model, or its labels are not MNLI's.
    """
    label_order(spec.path)  # reads the model's config only: a wrong model is refused before a replica starts
    options = {
        "num_gpus": num_gpus if spec.on_gpu else 0,
        "max_concurrency": MAX_CONCURRENCY,
        "runtime_env": {
            "env_vars": {"OMP_NUM_THREADS": str(spec.threads), "TOKENIZERS_PARALLELISM": "false"}
            | ({} if spec.on_gpu else NO_GPUS)
        },
    }
    return start_replicas(name, Replicas(replica=EntailmentModel, spec=spec, options=options), num_replicas)
