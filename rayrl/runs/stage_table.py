"""The stage table: every stage of both pipelines, once, in the order in which they run.

Plan, run, status, progress, report and totals take their stages from here. A stage says when a run has it, what it
trains, what it pays from, which fleets it asks and what it leaves in its manifest; how it works is in `rayrl.stages`.

An entry tells a config from a run that is planned: nothing here reads a run directory.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Generic, Literal, TypeVar

from rayrl.algorithms.clustering import CLUSTERINGS
from rayrl.config import RunConfig, TrainingConfig
from rayrl.runs import stage_metrics as metrics

M = TypeVar("M", bound=metrics.StageMetrics, covariant=True)

Purpose = Literal["label", "evaluate", "test", "people"]
"""Budgets of the ledger: questions that teach, questions that measure, those that try the judge out beforehand, and
those that people are asked beside judges."""
EMBEDDINGS = "embeddings-"
"""In the folder of the selection: vectors of the responses, named by the work that they are."""
ENTROPIES = "entropies-"
"""There too: entropies of the evaluator's score distributions, named likewise."""
ANSWERS = "answers-"
"""In the folder of the evaluation: a policy's answers to the held-out prompts, named by the policy's version."""


@dataclass(frozen=True, kw_only=True)
class FleetUse:
    """A fleet that a stage asks. Equal values are one fleet."""

    role: Literal["generators", "embedders", "entailment"]
    """For the first two also the config's table that sizes it."""
    model: str = "policy"
    """What embeds: "policy", or a sentence-embedding model's folder or hub id."""
    pooling: str | None = None


GENERATORS = FleetUse(role="generators")
ENTAILMENT = FleetUse(role="entailment")


@dataclass(frozen=True, kw_only=True)
class Training:
    """A training of a stage, for a given config."""

    section: str
    """The config's table that says how."""
    settings: TrainingConfig
    batch_size: int
    """Items of one logged step; PPO logs a whole rollout."""
    items: str
    """What these are: "rows", "pairs" or "responses"."""
    num_members: int = 1
    """Models trained one after another. Each of an ensemble's is a stage `Stage.member(i)` of its own."""
    samples: bool = False
    """Whether it is served by the stage's fleets while it trains, as PPO is. A fit asks them only once it has ended, to
    measure what it has trained."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Stage(Generic[M]):
    """One entry of the table."""

    name: str
    """Of its folder in the run directory, its curve, and its row in plan, status and report."""
    metrics: type[M]
    """What its manifest holds."""
    occurs: Callable[[RunConfig, int], bool]
    """Whether a run with this config has it in the round of this number, from 1."""
    place: Literal["start", "round", "end"] = "round"
    """Stages of "start" and "end" are of the whole run; they belong to round 1, whatever the number of rounds."""
    training: Callable[[RunConfig], Training | None] = lambda config: None
    pays: Purpose | None = None
    """The budget it asks the oracle from."""
    fleets: Callable[[RunConfig], tuple[FleetUse, ...]] = lambda config: ()
    prompts: Callable[[RunConfig], Literal["pool", "held_out", "refresh"] | None] = lambda config: None
    """Whose blocks its tables follow, one block each, for the progress of a stage that goes on."""
    kept: tuple[str, ...] = ()
    """Beginnings of the names of sub-folders whose names tell all that decides their content. They stay when the stage
    has other work to do."""

    def member(self, number: int) -> "Stage[metrics.FitMetrics]":
        """The training of one member of an ensemble: a stage with a folder, a curve and a manifest of its own."""
        return Stage(name=f"{self.name}-{number}", metrics=metrics.FitMetrics, occurs=self.occurs)


AnyStage = Stage[metrics.StageMetrics]


def stages_of(config: RunConfig) -> list[tuple[AnyStage, int]]:
    """List every stage that a run with this config has, with its round, in order."""

    def entries(place: str, number: int) -> Iterator[tuple[AnyStage, int]]:
        return ((stage, number) for stage in STAGES if stage.place == place and stage.occurs(config, number))

    rounds = range(1, config.rounds + 1)
    return [
        *entries("start", 1),
        *(entry for number in rounds for entry in entries("round", number)),
        *entries("end", 1),
    ]


def fits_evaluator(config: RunConfig) -> bool:
    """Return whether an evaluator is trained; under the controls "direct" and "expert" only the oracle labels."""
    return config.learns_from_judgements and config.labels in ("proxy", "routed", "shuffled")


def num_refresh_blocks(num_wanted: int | None, block_size: int, num_blocks: int) -> int:
    """Count the blocks of the pool that the refresh samples: whole ones, as many as it takes.

    Args:
        num_wanted: `refresh.num_prompts`; None is the whole pool.
        block_size: prompts of a block.
        num_blocks: blocks of the pool's prompts that train.
    """
    return num_blocks if num_wanted is None else min(num_blocks, math.ceil(num_wanted / block_size))


def policy_embedders(pooling: str) -> FleetUse:
    """Embedding replicas of the policy's architecture: selection, scalar evaluators, reward models."""
    return FleetUse(role="embedders", pooling=pooling)


def _selecting_embedders(config: RunConfig) -> FleetUse:
    return FleetUse(role="embedders", model=config.select.embedder, pooling=config.select.pooling)


def _selection_fleets(config: RunConfig) -> tuple[FleetUse, ...]:
    readers = _evaluator_fleets(config) if config.select.reads_evaluator else ()
    return (*readers, _selecting_embedders(config)) if config.embeds_pool else readers


def _evaluator_fleets(config: RunConfig) -> tuple[FleetUse, ...]:
    if not fits_evaluator(config):
        return ()
    match config.evaluator.type:
        case "generative":
            return (GENERATORS,)
        case "scalar":
            return (policy_embedders(config.select.pooling),)
        case "head":
            return (_selecting_embedders(config),)


def reward_fleets(config: RunConfig) -> tuple[FleetUse, ...]:
    """Fleets that serve the reward of PPO; none for a function."""
    if config.ppo.reward == "reward_model":
        return (policy_embedders("last"),)
    return _evaluator_fleets(config)


def clustering_embedders(config: RunConfig) -> FleetUse:
    """Embedding replicas that cluster responses, or are tried where entailment accepts no prompt at all."""
    model = config.refresh.spg.embedder or "policy"
    return FleetUse(role="embedders", model=model, pooling=config.select.pooling)


def _clustering_fleets(config: RunConfig) -> tuple[FleetUse, ...]:
    if config.learns_from_comparisons and config.refresh.method != "spg":
        return ()
    if CLUSTERINGS[config.refresh.spg.clustering].reads == "entailment":
        return (ENTAILMENT,)
    return (clustering_embedders(config),)


def _synthesis_fleets(config: RunConfig) -> tuple[FleetUse, ...]:
    """List the fleets that rank the responses and those that cluster them. Proxy DPO ranks in `pseudo_label`."""
    if config.pipeline == "proxy_dpo":
        return (*_evaluator_fleets(config), *_clustering_fleets(config))
    rankers = (GENERATORS,) if config.refresh.method == "self_judged" else reward_fleets(config)
    return (*rankers, *_clustering_fleets(config))


def _evaluation_fleets(config: RunConfig) -> tuple[FleetUse, ...]:
    if config.pipeline == "proxy_dpo":
        return (GENERATORS, *_evaluator_fleets(config))
    return (GENERATORS, *reward_fleets(config))


def _compares(config: RunConfig, number: int) -> bool:
    """Return whether D grows in this round: a file of pairs is read once, the oracle is asked in each round."""
    return config.learns_from_comparisons and (number == 1 or config.asks_for_comparisons)


def _refreshes(config: RunConfig, *methods: str) -> bool:
    return config.learns_from_comparisons and config.refresh.method in methods


def _training(section: str, settings: TrainingConfig, items: str) -> Training:
    return Training(section=section, settings=settings, batch_size=settings.batch_size, items=items)


def _reward_model_training(config: RunConfig) -> Training:
    training = _training("reward_model", config.reward_model, "pairs")
    return replace(training, num_members=config.reward_model.num_members)


def _ppo_training(config: RunConfig) -> Training:
    training = _training("ppo", config.ppo, "responses")
    return replace(training, batch_size=config.ppo.responses_per_rollout, samples=True)


POOL = Stage(name="pool", metrics=metrics.PoolMetrics, place="start", occurs=lambda config, number: True)
SFT = Stage(
    name="sft",
    metrics=metrics.SftMetrics,
    place="start",
    occurs=lambda config, number: config.sft.enabled,
    training=lambda config: _training("sft", config.sft, "rows"),
)
GENERATE = Stage(
    name="generate",
    metrics=metrics.GenerateMetrics,
    occurs=lambda config, number: config.learns_from_judgements or config.asks_for_comparisons,
    fleets=lambda config: (GENERATORS,),
    prompts=lambda config: "pool",
)
SEED_RESPONSES = Stage(
    name="seed_responses",
    metrics=metrics.SeedResponsesMetrics,
    occurs=lambda config, number: config.learns_from_judgements and config.generate.source == "seed",
)
CANDIDATES = Stage(
    name="candidates",
    metrics=metrics.CandidatesMetrics,
    occurs=lambda config, number: config.learns_from_judgements and number > 1,
    prompts=lambda config: "pool" if config.generate.source == "policy" else None,
)
SELECT = Stage(
    name="select",
    metrics=metrics.SelectMetrics,
    occurs=lambda config, number: config.learns_from_judgements or config.asks_for_comparisons,
    fleets=_selection_fleets,
    prompts=lambda config: "pool" if config.generate.source == "policy" else None,
    kept=(EMBEDDINGS, ENTROPIES),
)
QUERY = Stage(
    name="query",
    metrics=metrics.QueryMetrics,
    occurs=lambda config, number: config.learns_from_judgements,
    pays="label",
)
FIT_EVALUATOR = Stage(
    name="fit_evaluator",
    metrics=metrics.FitEvaluatorMetrics,
    occurs=lambda config, number: fits_evaluator(config),
    training=lambda config: _training("evaluator", config.evaluator, "rows") if config.evaluator.trains_model else None,
    fleets=_evaluator_fleets,
)
PREFERENCES = Stage(
    name="preferences",
    metrics=metrics.PreferencesMetrics,
    occurs=_compares,
    pays="label",
)
FIT_REWARD_MODEL = Stage(
    name="fit_reward_model",
    metrics=metrics.RewardModelMetrics,
    occurs=_compares,
    training=lambda config: None if config.reward_model.path is not None else _reward_model_training(config),
    fleets=lambda config: (policy_embedders("last"),),
)
PPO = Stage(
    name="ppo",
    metrics=metrics.PpoMetrics,
    occurs=lambda config, number: (
        config.pipeline == "rlp" and (config.ppo.reward != "reward_model" or _compares(config, number))
    ),
    training=_ppo_training,
    fleets=lambda config: (GENERATORS, *reward_fleets(config)),
)
SAMPLES = Stage(
    name="samples",
    metrics=metrics.GenerateMetrics,
    occurs=lambda config, number: _refreshes(config, "spg", "uml", "reward_pairs", "self_judged"),
    fleets=lambda config: (GENERATORS,),
    prompts=lambda config: "refresh",
)
SYNTHESIZE = Stage(
    name="synthesize",
    metrics=metrics.SynthesizeMetrics,
    occurs=lambda config, number: (
        config.pseudo_label.synthetic or _refreshes(config, "spg", "reward_pairs", "self_judged")
    ),
    fleets=_synthesis_fleets,
    prompts=lambda config: "refresh" if config.pipeline == "rlp" else "pool",
)
IMPORTANCE = Stage(
    name="importance",
    metrics=metrics.ImportanceMetrics,
    occurs=lambda config, number: _refreshes(config, "ocrm"),
    fleets=lambda config: (GENERATORS,),
)
REFIT_REWARD_MODEL = Stage(
    name="refit_reward_model",
    metrics=metrics.RewardModelMetrics,
    occurs=lambda config, number: config.learns_from_comparisons and config.refresh.method != "none",
    training=_reward_model_training,
    fleets=lambda config: (policy_embedders("last"),),
)
PPO_REFRESHED = Stage(
    name="ppo_refreshed",
    metrics=metrics.PpoMetrics,
    occurs=lambda config, number: config.learns_from_comparisons,
    training=_ppo_training,
    fleets=lambda config: (GENERATORS, *reward_fleets(config)),
)
PSEUDO_LABEL = Stage(
    name="pseudo_label",
    metrics=metrics.PseudoLabelMetrics,
    occurs=lambda config, number: config.pipeline == "proxy_dpo",
    fleets=_evaluator_fleets,
    prompts=lambda config: "pool",
)
DPO = Stage(
    name="dpo",
    metrics=metrics.DpoMetrics,
    occurs=lambda config, number: config.pipeline == "proxy_dpo",
    training=lambda config: _training("dpo", config.dpo, "pairs"),
)
TRACK_REWARDS = Stage(
    name="track_rewards",
    metrics=metrics.TrackRewardsMetrics,
    place="end",
    occurs=lambda config, number: config.learns_from_comparisons and config.evaluate.diagnosis_budget > 0,
    pays="evaluate",
    fleets=reward_fleets,
)
AUDIT_PAIRS = Stage(
    name="audit_pairs",
    metrics=metrics.AuditPairsMetrics,
    place="end",
    occurs=lambda config, number: (
        _refreshes(config, "spg", "reward_pairs", "self_judged") and config.evaluate.diagnosis_budget > 0
    ),
    pays="evaluate",
)
EVALUATE = Stage(
    name="evaluate",
    metrics=metrics.EvaluateMetrics,
    place="end",
    occurs=lambda config, number: True,
    pays="evaluate",
    fleets=_evaluation_fleets,
    prompts=lambda config: "held_out",
    kept=(ANSWERS,),
)

STAGES: tuple[AnyStage, ...] = (
    POOL,
    SFT,
    GENERATE,
    SEED_RESPONSES,
    CANDIDATES,
    SELECT,
    QUERY,
    FIT_EVALUATOR,
    PREFERENCES,
    FIT_REWARD_MODEL,
    PPO,
    SAMPLES,
    SYNTHESIZE,
    IMPORTANCE,
    REFIT_REWARD_MODEL,
    PPO_REFRESHED,
    PSEUDO_LABEL,
    DPO,
    TRACK_REWARDS,
    AUDIT_PAIRS,
    EVALUATE,
)
