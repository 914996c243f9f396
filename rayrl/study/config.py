"""Settings of a study, and the run configs that it is made of: a base config, and what each cell changes in it.

Importing this module loads no torch, scipy, ray or vllm.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any, Literal, cast

from pydantic import Field, field_validator, model_validator

from rayrl.algorithms.selection.strategies import STRATEGIES
from rayrl.config.function_name import FunctionName
from rayrl.config.loading import load_config, load_table
from rayrl.config.oracle import ReplayOracleConfig
from rayrl.config.run import RunConfig
from rayrl.config.table import Operation, Place, Table, plain_name

Point = tuple[tuple[str, Any], ...]
"""A point of the grid: settings by dotted name, with their values; empty without a grid."""

LABEL_MEASURES = (
    *("pair_accuracy", "rank_correlation", "regret"),
    *("pair_accuracy_without_length", "rank_correlation_without_length", "regret_without_length"),
)
"""Measures of kind "labels", as `rayrl.algorithms.agreement.MEASURES` has them, whose module needs scipy."""
COMPARISON_MEASURES = ("agreement", "agreement_without_length")
"""Measures of kind "labels" where strategies ask for comparisons, before `LABEL_MEASURES`, which need scores."""
RUN_MEASURES = (
    *("gain", "score", "win_rate", "kl", "against_references", "length_controlled_win_rate"),
    *("perplexity", "distinct2", "tokens", "labels"),
)
"""Measures of kind "runs", of a policy (`rayrl.study.run_measures`)."""
AGREEMENT_MEASURES = tuple(
    f"agreement_{reward}_{pairs}"
    for reward in ("r", "refreshed")
    for pairs in ("held_out", "ppo_against_m1", "pairs_of_ppo", "pairs_of_ppo_refreshed")
)
"""Measures of kind "runs", of reward models."""
MEASURES_BY_PROMPT = ("gain", "score", "win_rate")
"""Measures of kind "runs" that have a value for each prompt, so that they can be paired and tested."""
CHOICE_SETTINGS = ("batches", "first_batch", "num_heads")
"""Settings of select that a cell of kind "labels" reads."""
VECTOR_SETTINGS = ("text", "embedder", "pooling", "normalize")
"""Settings of select that decide the vectors of a pool, unless it comes with them."""
SET_BY_STUDY = ("run_dir", "name", "reuse", "seed", "oracle.ledger")
"""Settings of runs that a study decides for each cell."""
LISTED = {"select.strategy": "strategies", "select.budget": "budgets"}
"""Settings that are factors of every study, by the list of their values."""
SCALAR_EVALUATOR = "scalar"
Asks = Literal["responses", "pairs"]
"""What the strategies of a study ask about."""


class VariantConfig(Table):
    """A row of a study of runs that differs from the base config by more than its strategy."""

    title: str = ""
    """In tables; empty is the variant's name."""
    set: dict[str, Any] = Field(default={})
    """Settings of its runs, merged last; none that the study decides (`SET_BY_STUDY`), and none that is on the grid."""
    policy: str | None = None
    """The policy of its run that is measured ("m1", "ppo"); None is the last one, "m2" or "rlp"."""
    pipeline: FunctionName | None = None
    """Another pipeline than the config's, as `jobs.bench.plain_rlhf:first_ppo_only`."""
    reuse: str | None = None
    """Strategy or variant whose run of the same seed gives finished stages of equal inputs; None is the first one."""
    is_ceiling: bool = False
    """Whether it labels everything: what labels gain is a share of what this one gains."""


class VectorsConfig(Table):
    """A pool with vectors that were made elsewhere: one row per response. No model is asked for anything."""

    path: Place
    """Table of prompts, responses and vectors."""
    prompt_column: str = "prompt"
    response_column: str = "response"
    vector_column: str = "vector"
    """A list of numbers, of one length in all rows."""


class ResourcesConfig(Table):
    """Share of the cluster that the cells of a study take."""

    max_cells: int | None = Field(default=None, gt=0)
    """Cells at once; None is as many as the cluster has CPUs for, and one run at a time."""
    cpus_per_cell: int = Field(default=1, gt=0)
    """kind "labels": CPUs, and threads, of a cell."""
    timeout_s: float = Field(default=3600.0, gt=0)
    """kind "labels": longest time of a cell. One that takes longer has failed."""


class StudyConfig(Table):
    """One study: every strategy at every budget with every seed, at every point of the grid."""

    name: str
    """Of the study in its report."""
    study_dir: Operation[Place]
    """Folder of the study: a local path, NFS, or any fsspec URL."""
    base: Place
    """Config of a run. Paths in it start at the working directory."""
    kind: Literal["labels", "runs"] = "labels"
    """"labels" trains no policy: labels are chosen from one pool, an evaluator is fitted on them, and compared with the
    oracle on held-out prompts. "runs" runs the base config's pipeline in every cell."""
    strategies: list[str] = Field(default=[])
    """Values of select.strategy."""
    budgets: list[int] = Field(default=[])
    """Values of select.budget, ascending; none in a study of runs is the base config's."""
    seeds: list[int] = Field(default=[0, 1, 2], min_length=1)
    baseline: str = "random"
    """The strategy or variant that all others are compared with."""
    measures: list[str] = Field(default=[])
    """The first is the one that is tested, drawn and counted in labels needed; none are all of the kind, in order."""
    intervals: bool = True
    """Whether differences are tested and labels needed get intervals, which takes two seeds or more."""
    set: dict[str, Any] = Field(default={})
    """Settings of all cells, merged into the base config."""
    grid: dict[str, Any] = Field(default={})
    """Lists of values by setting: a further factor each. Of kind "labels" only what its cells read."""
    variants: dict[str, VariantConfig] = Field(default={})
    """kind "runs": rows beside the strategies, by name."""
    gold_answers: int = Field(default=0, ge=0)
    """kind "runs": answers that the oracle scores at each measured step of the PPO of a row's policy, two to a held-out
    prompt, once its run is over; 0 draws no such curve. PPO has kept them (`ppo.evaluate_every`). These scores are
    outside of ledger and budgets, so that the oracle must be a function or a table."""
    rows: list[str] = Field(default=[])
    """The strategies and variants that are run; none are all."""

    held_out: float = Field(default=0.3, gt=0, lt=1)
    """kind "labels": share of the pool's prompts on which the evaluator is compared with the oracle; labels are chosen
    from the rest."""
    split: Literal["seed", "study"] = "seed"
    """kind "labels": whether each seed holds out other prompts, or all the same, which takes fewer labels."""
    evaluator: Literal["head", "scalar"] = "head"
    """kind "labels": what is fitted on the labels. "head" is an ensemble on the vectors (`rayrl.algorithms.heads`);
    "scalar" is the base config's scalar evaluator, a training of M1 in every cell, one cell at a time."""
    ceiling: bool = True
    """kind "labels": whether everything is labelled once, for what that gives. Of comparisons: disjoint pairs of all
    responses to a prompt."""
    truth: ReplayOracleConfig | None = None
    """kind "labels": other answers with which the evaluator is compared on the held-out prompts, in place of the
    oracle's: the mean of an expert's repeated scores, or the majority of other people. They cost nothing."""
    vectors: VectorsConfig | None = None
    """kind "labels": a pool with vectors; None samples and embeds with the base config's models."""
    max_queries: Operation[int | None] = Field(default=None, gt=0)
    """Refuse a study that may pay for more queries than so many: labels, and of runs those of the evaluation as well;
    None takes what it needs."""
    resources: Operation[ResourcesConfig] = ResourcesConfig()
    num_resamples: int = Field(default=2000, ge=100)
    """Of the bootstrap."""

    @field_validator("name")
    @classmethod
    def _plain_name(cls, name: str) -> str:
        return plain_name(name, "my-study")

    @field_validator("strategies")
    @classmethod
    def _known_strategies(cls, strategies: list[str]) -> list[str]:
        unknown = [name for name in strategies if name not in STRATEGIES]
        if unknown:
            known = ", ".join(f'"{name}"' for name in STRATEGIES)
            raise ValueError(f'must be of {known}, got "{unknown[0]}"; correct it, or leave it out')
        return strategies

    @field_validator("budgets")
    @classmethod
    def _ascending(cls, budgets: list[int]) -> list[int]:
        if any(budget < 1 for budget in budgets) or budgets != sorted({*budgets}):
            raise ValueError(f"must be whole numbers above 0, ascending, each once, got {budgets}; sort them")
        return budgets

    @field_validator("seeds", "strategies", "measures")
    @classmethod
    def _each_once(cls, values: list[Any]) -> list[Any]:
        repeated = [value for place, value in enumerate(values) if value in values[:place]]
        if repeated:
            raise ValueError(f"must name each once, got {repeated[0]!r} twice; leave one out")
        return values

    @field_validator("seeds")
    @classmethod
    def _countable(cls, seeds: list[int]) -> list[int]:
        if min(seeds) < 0:
            raise ValueError(f"must be 0 or more, got {min(seeds)}; write another one")
        return seeds

    @field_validator("grid")
    @classmethod
    def _levels(cls, grid: dict[str, Any]) -> dict[str, Any]:
        for dotted, values in leaves(grid):
            if not isinstance(values, list) or len(cast(list[object], values)) < 2:
                raise ValueError(
                    f"must have a list of two values or more for each setting, got {dotted} = {values!r}; put one "
                    "value into [set]"
                )
        return grid

    @model_validator(mode="after")
    def _rules(self) -> "StudyConfig":
        _check_arms(self)
        _check_measures(self)
        for setting in self.grid_settings:
            if setting in LISTED:
                raise ValueError(f"grid must not hold {setting}; write its values into {LISTED[setting]}")
        if self.intervals and len(self.seeds) < 2:
            raise ValueError(
                f"seeds must be two or more where intervals are asked for, got {self.seeds}; add one, or set "
                "intervals = false"
            )
        if self.kind == "labels":
            _check_labels(self)
        else:
            _check_runs(self)
        return self

    @property
    def arms(self) -> list[str]:
        """Return the names of what is compared: strategies, then variants."""
        every = [*self.strategies, *self.variants]
        return [arm for arm in every if arm in self.rows] if self.rows else every

    @property
    def measured(self) -> list[str]:
        """Return the names of the measures in the tables; the first is the one that is tested."""
        return self.measures or list(self.known_measures)

    @property
    def asks(self) -> Asks:
        """Return what the strategies ask about: single responses, or comparisons of two."""
        return STRATEGIES[self.strategies[0]].asks if self.strategies else "responses"

    @property
    def known_measures(self) -> tuple[str, ...]:
        """Return the names of the measures that its cells may have, but for those of reward models."""
        if self.kind == "runs":
            return RUN_MEASURES
        return (*COMPARISON_MEASURES, *LABEL_MEASURES) if self.asks == "pairs" else LABEL_MEASURES

    @property
    def factors(self) -> dict[str, list[Any]]:
        """Return the grid: values by dotted setting."""
        return dict(leaves(self.grid))

    @property
    def grid_settings(self) -> list[str]:
        """Return the dotted settings that the grid changes; a value may be a table of several."""
        values = [{setting: value} for setting, levels in self.factors.items() for value in levels]
        return list(dict.fromkeys(name for each in values for name, _ in leaves(each)))

    def points(self) -> list[Point]:
        """List the points of the grid; one empty one without a grid."""
        levels = [[_hashable(value) for value in values] for values in self.factors.values()]
        return [tuple(zip(self.factors, values, strict=True)) for values in product(*levels)]

    def title(self, arm: str) -> str:
        """Return what a table calls a strategy or variant."""
        variant = self.variants.get(arm)
        return (variant.title if variant else "") or arm


def load_study(path: str | Path, overrides: Sequence[str] = ()) -> StudyConfig:
    """Read a study.

    Raises:
        ConfigError: one message that names field, rule, value and remedy for every mistake found.
    """
    return load_table(path, list(overrides), StudyConfig)


def run_config(study: StudyConfig, *settings: tuple[str, object]) -> RunConfig:
    """Load the base config with the study's settings, and then these, by dotted name.

    Raises:
        ConfigError: it does not exist, or one of the settings is refused.
    """
    return load_config(study.base, settings=[*study.set.items(), *settings])


class _Level(dict[str, Any]):
    """A table as a value of the grid, which names cells: it can be hashed, and does not change."""

    def __hash__(self) -> int:  # type: ignore[override]
        return hash(json.dumps(self, sort_keys=True))


def _hashable(value: object) -> object:
    if isinstance(value, dict):
        return _Level(cast(dict[str, object], value))
    return tuple(cast(list[object], value)) if isinstance(value, list) else value


def leaves(tree: Mapping[str, object], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the values that are no tables, by dotted name."""
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from leaves(cast(dict[str, object], value), f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _check_arms(study: StudyConfig) -> None:
    unknown = [row for row in study.rows if row not in (*study.strategies, *study.variants)]
    if unknown:
        known = ", ".join(f'"{arm}"' for arm in (*study.strategies, *study.variants))
        raise ValueError(f'rows must be of {known}, got "{unknown[0]}"; correct it, or leave it out')
    if not study.arms:
        raise ValueError('strategies is empty: name what is compared, for one strategies = ["random", "k_center"]')
    both = sorted({*study.strategies} & study.variants.keys())
    if both:
        raise ValueError(f"variants must not have the name of a strategy, got {both[0]!r}; rename it")
    if study.baseline not in study.arms:
        known = ", ".join(f'"{arm}"' for arm in study.arms)
        raise ValueError(f'baseline must be one of {known}, got "{study.baseline}"; correct it, or add that strategy')


def _check_measures(study: StudyConfig) -> None:
    known = (*study.known_measures, *(AGREEMENT_MEASURES if study.kind == "runs" else ()))
    unknown = [name for name in study.measures if name not in known]
    if unknown:
        asks = " and strategies ask for scores" if unknown[0] in COMPARISON_MEASURES else ""
        raise ValueError(
            f'measures must be of {", ".join(known)} where kind is "{study.kind}"{asks}, got "{unknown[0]}"; correct it'
        )
    if study.kind == "runs" and study.intervals and study.measured[0] not in MEASURES_BY_PROMPT:
        raise ValueError(
            f"measures must begin with {', '.join(MEASURES_BY_PROMPT[:-1])} or {MEASURES_BY_PROMPT[-1]}, which have a "
            f'value for each prompt, where intervals are asked for, got "{study.measured[0]}": the first one is '
            "tested; put one of them first, or set intervals = false"
        )


def _check_labels(study: StudyConfig) -> None:
    if study.gold_answers:
        raise ValueError(
            f'gold_answers must be 0 where kind is "labels", got {study.gold_answers}: no policy is trained; leave it '
            'out, or set kind = "runs"'
        )
    if not study.budgets:
        raise ValueError("budgets is empty: write the numbers of labels, for one budgets = [25, 50, 100]")
    if study.variants:
        raise ValueError(
            f'variants must be empty where kind is "labels", got {", ".join(study.variants)}: no policy is trained; '
            'set kind = "runs", or leave them out'
        )
    read = CHOICE_SETTINGS if study.vectors is not None else (*CHOICE_SETTINGS, *VECTOR_SETTINGS)
    for setting in study.grid_settings:
        if setting.removeprefix("select.") not in read or not setting.startswith("select."):
            raise ValueError(
                f'grid must hold {", ".join(f"select.{name}" for name in read)} where kind is "labels"'
                f"{' and the pool has vectors' if study.vectors is not None else ''}, which cells read, got {setting}; "
                'put it into [set], or set kind = "runs"'
            )
    if "select.first_batch" in study.grid_settings and not any(STRATEGIES[arm].reads_heads for arm in study.arms):
        raise ValueError(
            "grid must not hold select.first_batch where no strategy reads heads, got "
            f"{', '.join(study.arms)}: it is of those that do; leave it out"
        )
    for setting, _ in leaves(study.set):
        if setting in ("run_dir", "name"):
            raise ValueError(f"set must not hold {setting}, which the study decides for its pools; leave it out")
        if setting in LISTED:
            raise ValueError(
                f'set must not hold {setting} where kind is "labels", whose cells do not read it; write its values '
                f"into {LISTED[setting]}"
            )
    for name in study.strategies:
        if STRATEGIES[name].asks != study.asks:
            raise ValueError(
                f'strategies must all ask for scores, or all for comparisons, where kind is "labels", got '
                f'"{study.strategies[0]}", which asks about {study.asks}, and "{name}", which asks about '
                f"{STRATEGIES[name].asks}; leave out those of one kind, or make two studies"
            )
        if STRATEGIES[name].reads_evaluator:
            raise ValueError(
                f'strategies must be of those that read no evaluator of an earlier round where kind is "labels", got '
                f'"{name}"; leave it out, or set kind = "runs"'
            )
    if study.evaluator == SCALAR_EVALUATOR:
        _check_scalar(study)


def _check_scalar(study: StudyConfig) -> None:
    max_cells = study.resources.max_cells
    for is_refused, rule in (
        (study.asks == "pairs", f'strategies must ask for scores, got "{study.strategies[0]}", which asks about pairs'),
        (study.vectors is not None, "vectors must be left out: M1 is trained, on the tokens of its own pool"),
        (
            max_cells is not None and max_cells > 1,
            f"resources.max_cells must be 1, got {max_cells}: each training uses the whole cluster",
        ),
    ):
        if is_refused:
            raise ValueError(f'{rule}, where evaluator is "{SCALAR_EVALUATOR}"; correct it, or set evaluator = "head"')


def _check_runs(study: StudyConfig) -> None:
    resources = study.resources
    if resources.max_cells is not None and resources.max_cells > 1:
        raise ValueError(
            f'resources.max_cells must be 1 where kind is "runs", got {resources.max_cells}: runs at once could pay '
            "twice for one question, since one run at a time may own the ledger; leave it out. A run's own fleets and "
            "workers use the cluster"
        )
    tables = {"grid": study.grid_settings, "set": [setting for setting, _ in leaves(study.set)]}
    variants = {name: variant for name, variant in study.variants.items() if name in study.arms}
    own = {f"variants.{name}.set": [setting for setting, _ in leaves(v.set)] for name, v in variants.items()}
    for table, settings in (tables | own).items():
        for setting in settings:
            if setting in SET_BY_STUDY:
                raise ValueError(
                    f"{table} must not hold {setting}, which the study decides for each cell: its runs lie in "
                    "study_dir, and share one ledger; leave it out"
                )
            if setting == "select.budget" and (table in own or study.budgets):
                raise ValueError(f"{table} must not hold select.budget, which budgets decides; write it there")
            if table in own and setting in study.grid_settings:
                raise ValueError(
                    f"{table} must not hold {setting}, of which the grid has the values; leave it out of one of them"
                )
    _check_reuse(study)
    ceilings = [name for name, variant in study.variants.items() if variant.is_ceiling]
    if len(ceilings) > 1:
        raise ValueError(f"variants must have one ceiling at most, got {', '.join(ceilings)}; choose one")
    if study.vectors is not None:
        raise ValueError('vectors must be left out where kind is "runs": runs embed what they sample themselves')
    if study.truth is not None:
        raise ValueError('truth must be left out where kind is "runs", whose evaluation asks the oracle; leave it out')


def _check_reuse(study: StudyConfig) -> None:
    reused = {arm: study.variants[arm].reuse for arm in study.arms if arm in study.variants}
    for name, other in reused.items():
        if other is not None and other not in study.arms:
            known = ", ".join(f'"{arm}"' for arm in study.arms)
            raise ValueError(
                f'variants.{name}.reuse must name a strategy or variant that is run, {known}, got "{other}"; correct '
                "it, or leave it out, which takes the first one"
            )
        path = [name]
        # Of itself a row takes nothing over.
        while other is not None and other != path[-1]:
            path.append(other)
            if other in path[:-1]:
                raise ValueError(f"variants.{name}.reuse must not come round, got {' -> '.join(path)}; leave one out")
            other = reused.get(other)
