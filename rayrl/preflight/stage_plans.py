"""Stage plans: what each stage of the run reserves, given the fleets that are up beside it.

One walk over the stage table serves both pipelines. A stage passes through one or more moments: a training, then the
fleets that measure its result; or one fleet after the other. Every moment must fit the cluster. A stage's row in the
plan is its training, or the largest of its moments if it trains nothing.

Fleets end in one of two ways:

* in turn (mode "alternate" of proxy_dpo): every training and every fleet has the cluster to itself;
* beside (mode "overlap", and always in rlp): a fleet stays up once it has started, into later rounds too. The
  entailment model's fleet ends after its stage. In rlp so does every embedding fleet that does not serve the reward.

A stage that the table gains is planned here without a change. How a stage works is not known here.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from rayrl.config import RunConfig
from rayrl.errors import ConfigError
from rayrl.preflight.cluster import Cluster
from rayrl.preflight.descriptions import describe_stage
from rayrl.preflight.model import ModelFacts
from rayrl.preflight.plan import Mode, Needs, ReferenceSource, StagePlan
from rayrl.preflight.resources import (
    Place,
    at_once,
    fleet_needs,
    lacking,
    place_of,
    require,
    training_needs,
)
from rayrl.runs.stage_table import (
    ENTAILMENT,
    FleetUse,
    Stage,
    clustering_embedders,
    fits_evaluator,
    reward_fleets,
    stages_of,
)

_ROLES = ("generators", "embedders", "entailment")
"""Order of fleets in a text."""


@dataclass(frozen=True, kw_only=True)
class StagePlans:
    """The stages of the plan, and what was decided for them."""

    stages: tuple[StagePlan, ...]
    mode: Mode
    reference: ReferenceSource


@dataclass(kw_only=True)
class Moments:
    """Everything that one stage reserves at some time, over all rounds."""

    trainings: list[StagePlan] = field(default_factory=list)
    others: list[StagePlan] = field(default_factory=list)
    """Fleets that serve the stage while nothing trains, or the driver alone."""

    @property
    def row(self) -> StagePlan:
        """The moment that the plan shows: of equally large ones the earliest."""
        return max(self.trainings or self.others, key=lambda plan: (plan.num_gpus, plan.num_cpus))

    def row_first(self) -> list[StagePlan]:
        """All moments. A refusal is about the row if it can be: its need is the one to meet."""
        row = self.row
        return [row, *(plan for plan in (*self.trainings, *self.others) if plan is not row)]


def plan_stages(config: RunConfig, cluster: Cluster, model: ModelFacts | None = None) -> StagePlans:
    """Plan every stage of the run; decide the mode, and where the reference log-probabilities come from.

    Args:
        config: the run.
        cluster: the nodes it has, and may get.
        model: facts of the policy; None estimates no memory.

    Raises:
        ResourceError: a stage fits in no mode; names stage, resource, need and what there is.
        ConfigError: settings that exclude each other.
    """
    place = place_of(config, cluster, model or ModelFacts())
    if config.pipeline == "rlp":
        beside = moments_beside(config, place=place)
        _require_all(beside, cluster)
        return StagePlans(stages=_rows(config, beside), mode="overlap", reference="generation")
    reference = _reference(config, place.dtype)
    in_turn = moments_in_turn(config, place=place)
    # First in turn, whatever the mode: a stage that does not fit alone has a simpler remedy than another mode.
    _require_all(in_turn, cluster)
    alternating = StagePlans(stages=_rows(config, in_turn), mode="alternate", reference=reference)
    if not fits_evaluator(config) or config.pseudo_label.mode == "alternate":
        return alternating
    beside = moments_beside(config, place=place, remedy=', or set pseudo_label.mode = "alternate"')
    overlapping = StagePlans(stages=_rows(config, beside), mode="overlap", reference=reference)
    if config.pseudo_label.mode == "overlap":
        _refuse_pass(reference)
        _require_all(beside, cluster)
        return overlapping
    is_streamable = reference != "pass"
    return overlapping if is_streamable and _fits(beside, cluster) else alternating


def moments_in_turn(config: RunConfig, *, place: Place) -> dict[Stage, Moments]:
    """Work out all moments if every training and every fleet of a stage has the cluster to itself."""
    found: dict[Stage, Moments] = {}
    for stage, _ in stages_of(config):
        # Every round is alike: nothing of an earlier round is up.
        if stage in found:
            continue
        moments = found[stage] = Moments()
        training = stage.training(config)
        fleets = _asked_fleets(stage, config)
        if ENTAILMENT in fleets:
            others = [fleet for fleet in fleets if fleet != ENTAILMENT]
            # Put first, so that of moments that reserve the same this one is the row: it is what the stage is about.
            fleets = [ENTAILMENT, clustering_embedders(config), *others]
        serving = [fleet_needs(fleet, config, place=place) for fleet in fleets]
        if training is not None:
            workers = training_needs(training, config, place=place)
            # Not even here do fleets make room for a training that they serve.
            beside = serving if training.samples else []
            moments.trainings.append(_moment(stage, config, [workers], beside))
        if training is None or not training.samples:
            moments.others += [_moment(stage, config, [needs], []) for needs in serving]
        if training is None and not serving:
            moments.others.append(_moment(stage, config, [], []))
    return found


def moments_beside(config: RunConfig, *, place: Place, remedy: str = "") -> dict[Stage, Moments]:
    """Work out all moments if fleets stay up beside what comes after them.

    Args:
        config: the run.
        place: where engines and trainings run.
        remedy: added to the settings to lower, where fleets are beside.
    """
    found: dict[Stage, Moments] = {}
    up: list[FleetUse] = []

    def moment(stage: Stage, leading: list[Needs], beside: Iterable[FleetUse]) -> StagePlan:
        # In the order of their start fleets would be named differently in runs that reserve the same.
        ordered = sorted(beside, key=lambda fleet: _ROLES.index(fleet.role))
        return _moment(stage, config, leading, needs_of(ordered), remedy)

    def needs_of(fleets: Iterable[FleetUse]) -> list[Needs]:
        return [fleet_needs(fleet, config, place=place) for fleet in fleets]

    for stage, _ in stages_of(config):
        moments = found.setdefault(stage, Moments())
        training = stage.training(config)
        asked = _asked_fleets(stage, config)
        # The entailment model's fleet never stays up: it is no part of `up`.
        fleets = [fleet for fleet in asked if fleet != ENTAILMENT]
        started = [fleet for fleet in fleets if fleet not in up]
        if training is not None:
            workers = training_needs(training, config, place=place)
            # A fit asks its fleets only once it has ended: those it brings are not beside it yet.
            beside = [*up, *started] if training.samples else up
            moments.trainings.append(moment(stage, [workers], beside))
        up += started
        if ENTAILMENT in asked:
            moments.others.append(moment(stage, needs_of([ENTAILMENT]), up))
            # Tried where entailment accepts no prompt, after its fleet has ended.
            embedders = clustering_embedders(config)
            beside = [fleet for fleet in up if fleet != embedders]
            moments.others.append(moment(stage, needs_of([embedders]), beside))
            if embedders not in up:
                up.append(embedders)
        elif fleets and (training is None or not training.samples):
            # The row is about the fleets that the stage brings; where all are up already, about those it asks.
            leading = started or fleets
            beside = [fleet for fleet in up if fleet not in leading]
            moments.others.append(moment(stage, needs_of(leading), beside))
        elif training is None:
            moments.others.append(moment(stage, [], []))
        up = [fleet for fleet in up if _stays_up(fleet, config)]
    return found


def _asked_fleets(stage: Stage, config: RunConfig) -> list[FleetUse]:
    """The fleets that a stage asks, each once: one may serve both the reward and the clustering."""
    return list(dict.fromkeys(stage.fleets(config)))


def _stays_up(fleet: FleetUse, config: RunConfig) -> bool:
    """Return whether a fleet stays up after a stage that asked it; rlp ends embedders that only select or cluster."""
    return config.pipeline != "rlp" or fleet.role == "generators" or fleet in reward_fleets(config)


def _moment(
    stage: Stage, config: RunConfig, leading: Sequence[Needs], beside: Sequence[Needs], remedy: str = ""
) -> StagePlan:
    return at_once(leading, beside, name=stage.name, what=describe_stage(stage, config), remedy=remedy)


def _rows(config: RunConfig, found: dict[Stage, Moments]) -> tuple[StagePlan, ...]:
    """The rows of the plan: the stages of the first round, and those before and after all rounds."""
    return tuple(found[stage].row for stage, number in stages_of(config) if number == 1)


def _require_all(found: dict[Stage, Moments], cluster: Cluster) -> None:
    """Refuse the first stage that does not fit the cluster.

    Raises:
        ResourceError: names stage, resource, need and what there is.
    """
    for moments in found.values():
        for plan in moments.row_first():
            require(plan, cluster)


def _fits(found: dict[Stage, Moments], cluster: Cluster) -> bool:
    for moments in found.values():
        for plan in moments.row_first():
            if lacking(plan, cluster) is not None:
                return False
    return True


def _reference(config: RunConfig, dtype: str) -> ReferenceSource:
    if config.dpo.reference != "auto":
        return config.dpo.reference
    if config.dpo.ld_alpha < 1:
        return "pass"  # a pair's own weights of the tokens
    if config.dpo.is_quantized:
        return "pass"  # engines serve M1 unquantised
    # Below float32 the engine's log-probabilities are not the trainer's.
    return "generation" if dtype == "float32" else "pass"


def _refuse_pass(reference: ReferenceSource) -> None:
    """Refuse streaming where every pair is read once before the first step."""
    if reference == "pass":
        raise ConfigError(
            'pseudo_label.mode must be "auto" or "alternate" when the reference log-probabilities '
            'come from a pass before the first step (dpo.reference = "pass", or "auto" below float32, with '
            "dpo.ld_alpha below 1 or with dpo.lora.quantization), "
            'got "overlap"'
        )
