"""Configs of the runs that a study of labels is made of, and what they decide: oracle, evaluator and pool of a cell.

Every point of the grid has two: one of a run that would choose and ask as the cells do, and one of the run that makes
the pool.
"""

from dataclasses import replace

from rayrl.algorithms.comparisons import Order
from rayrl.algorithms.selection import STRATEGIES
from rayrl.config import RunConfig
from rayrl.config.oracle import OracleTable
from rayrl.errors import ConfigError
from rayrl.models.judge_prompt import load_rubric
from rayrl.oracles.replay import read_answers
from rayrl.records import content_id
from rayrl.runs import storage
from rayrl.runs.content import Input, content_of, contents_of
from rayrl.runs.run import CONFIG, LEDGER
from rayrl.study.comparisons_table import pool_settings, table_of
from rayrl.study.config import LABEL_MEASURES, SCALAR_EVALUATOR, Point, StudyConfig, run_config
from rayrl.study.pool import pool_key

ASKING: tuple[tuple[str, object], ...] = (
    *(("pipeline", "rlp"), ("preferences.source", "oracle"), ("ppo.reward", "reward_model"), ("labels", "proxy")),
)
"""Settings by which a run asks for comparisons, as its study does, whatever base is for."""
_ONE_ORDER = ("preferences.order", "random")
NO_CHOICE: tuple[tuple[str, object], ...] = (
    *(("select.strategy", "random"), ("select.budget", 2), ("select.batches", 1), ("select.first_batch", None)),
    ("labels", "proxy"),
)
"""Settings of the selection in a run of a study's own, which makes a pool or trains, and chooses nothing."""


def asking_config(study: StudyConfig, point: Point) -> RunConfig:
    """Load the config of a run that chooses and asks as the cells of a point do.

    Raises:
        ConfigError: the base config asks about something else than the strategies do, or no cell reads a setting.
    """
    # One that reads vectors and no heads goes with any setting of the others.
    choice = min(study.arms, key=lambda arm: (STRATEGIES[arm].reads_heads, not STRATEGIES[arm].reads_vectors))
    settings = [*point, ("select.strategy", choice), ("select.budget", study.budgets[-1])]
    if study.asks == "pairs":
        config = run_config(study, *settings, *ASKING)
        # A table has one order of each pair.
        return config if table_of(config) is None else run_config(study, *settings, *ASKING, _ONE_ORDER)
    config = run_config(study, *settings)
    if config.select.unit != "response" or config.asks_for_comparisons or not config.learns_from_judgements:
        raise ConfigError(
            'base must be a config whose oracle judges single responses (pipeline = "proxy_dpo", select.unit = '
            f'"response") where kind is "labels" and strategies ask for scores, got {study.base}; choose another, take '
            'strategies that ask for comparisons ("random_pairs", "delta_ucb"), or set kind = "runs"'
        )
    return config


def pool_config(study: StudyConfig, point: Point, asking: RunConfig) -> RunConfig:
    """Load the config of the run that samples and embeds the pool of a point. It chooses nothing."""
    folder = storage.absolute(study.study_dir)
    compared = comparisons_of(study, asking)
    chosen: list[tuple[str, object]] = [*NO_CHOICE]
    if study.asks == "pairs":
        chosen += [*ASKING, ("select.strategy", "random_pairs"), ("refresh.method", "none"), ("rounds", 1)]
    if compared is not None:
        chosen += pool_settings(compared)
    config = run_config(study, *point, *chosen)
    # By its key: another grid, or an edited prompt file, is another pool beside this one.
    name = f"pool-{pool_key(study, config)}"
    settings: list[tuple[str, object]] = [("run_dir", storage.join(folder, name)), ("name", f"{study.name}-{name}")]
    first = f"pool-{pool_key(study, run_config(study, *study.points()[0], *chosen))}"
    if first != name and storage.exists(storage.join(folder, first, CONFIG)):
        settings.append(("reuse", storage.join(folder, first)))
    return run_config(study, *point, *chosen, *settings, *_shared_ledger(study, config))


def fit_config(study: StudyConfig, pool: RunConfig) -> RunConfig:
    """Load the config of the run in whose folder the cells train the scalar evaluator, on M1 of a pool's run."""
    point = study.points()[0]
    name = f"fits-{content_id(pool_key(study, pool), pool.evaluator.science_json())}"
    place = storage.join(storage.absolute(study.study_dir), name)
    settings: list[tuple[str, object]] = [("run_dir", place), ("name", f"{study.name}-{name}")]
    settings.append(("reuse", pool.run_dir))
    return run_config(study, *point, *NO_CHOICE, *settings, *_shared_ledger(study, pool))


def _shared_ledger(study: StudyConfig, config: RunConfig) -> list[tuple[str, object]]:
    """Return the setting of the ledger that runs and cells of a study share, unless base names one."""
    folder = storage.absolute(study.study_dir)
    if config.oracle.ledger is not None or not storage.is_local(folder):
        return []
    return [("oracle.ledger", storage.join(folder, LEDGER))]


def comparisons_of(study: StudyConfig, config: RunConfig) -> OracleTable | None:
    """Return the table of comparisons that is the study's pool; None where another pool is asked about."""
    return table_of(config) if study.asks == "pairs" else None


def check_cell(study: StudyConfig, point: Point, strategy: str) -> None:
    """Refuse a strategy that the base config cannot have, such as one that reads labels and has none to begin with.

    Raises:
        ConfigError: the run's own refusal, and how a study sets what it asks for.
    """
    asking = ASKING if study.asks == "pairs" else ()
    try:
        run_config(study, *point, ("select.strategy", strategy), ("select.budget", study.budgets[-1]), *asking)
    except ConfigError as error:
        raise ConfigError(f'strategies: "{strategy}" is refused; [set] holds settings of all cells. {error}') from None


def check_answers(study: StudyConfig, config: RunConfig) -> None:
    """Refuse settings that no cell reads, answers that are not there, and an evaluator that base does not train."""
    for name, unset in (("seed_centers", False), ("stop_at", None)):
        if getattr(config.select, name) != unset:
            raise ConfigError(
                f'select.{name} must be left out where kind is "labels", got {getattr(config.select, name)!r}: no '
                'cell reads it; leave it out of base and [set], or set kind = "runs"'
            )
    if study.asks == "pairs" and (missing := config.oracle.missing_to_compare(config.rubric)):
        raise ConfigError(f"{missing}. The strategies of this study ask for comparisons")
    if study.truth is not None:
        holds = "comparisons" if study.asks == "pairs" else "judgements"
        if holds not in {table.holds for table in study.truth.tables()}:
            name = "comparisons_path" if study.asks == "pairs" else "path"
            raise ConfigError(
                f"truth.{name} is missing: the evaluator is compared with {holds} where strategies ask about "
                f"{study.asks}; name a table of them"
            )
        for table in study.truth.tables():
            read_answers(replace(table, setting=table.setting.replace("oracle.", "truth.")))
    unknown = [name for name in study.measures if name in LABEL_MEASURES]
    if unknown and not has_scores(study, config):
        raise ConfigError(
            f'measures must be of comparisons where no table has scores, got "{unknown[0]}"; leave it out, or name '
            "judgements beside the comparisons: oracle.path"
        )
    if study.evaluator == SCALAR_EVALUATOR and config.evaluator.type != SCALAR_EVALUATOR:
        raise ConfigError(
            f'evaluator.type of base must be "{SCALAR_EVALUATOR}", whose settings are then trained with, where the '
            f'study\'s evaluator is, got "{config.evaluator.type}"; set.evaluator.type = "{SCALAR_EVALUATOR}"'
        )


def has_scores(study: StudyConfig, config: RunConfig) -> bool:
    """Return whether there are scores of held-out responses to compare with: always, but for comparisons in a table."""
    if study.asks == "responses":
        return True
    tables = (config.oracle if study.truth is None else study.truth).tables()
    return any(table.holds == "judgements" for table in tables)


def order_of(study: StudyConfig, config: RunConfig) -> Order:
    """Return the order of comparisons; of single responses it is not read."""
    return config.preferences.order if study.asks == "pairs" and config.preferences is not None else "random"


def oracle_key(study: StudyConfig, config: RunConfig) -> str:
    """Name an oracle, what it answers from, the rubric by which it judges, and the held-out answers beside it."""
    contents = contents_of(config, {})
    read = [f"{setting} {contents[setting]}" for setting in sorted(contents) if setting.startswith("oracle.")]
    if study.asks == "pairs":
        read.append(order_of(study, config))
    if study.truth is not None:
        tables = [Input(setting=table.setting, place=table.path, kind="data") for table in study.truth.tables()]
        read += [study.truth.science_json(), *(content_of(table) or "" for table in tables)]
    return content_id("oracle", config.oracle.science_json(), load_rubric(config.rubric).version, *read)


def evaluator_key(study: StudyConfig, config: RunConfig) -> str:
    """Name what is fitted; M1, which a training starts from, is named by the pool."""
    if study.evaluator != SCALAR_EVALUATOR:
        return study.evaluator
    return content_id(SCALAR_EVALUATOR, config.evaluator.science_json())


def name_of_pool(study: StudyConfig, key: str) -> str:
    """Name a pool as cells see it: by what they ask about it, too."""
    return key if study.asks == "responses" else content_id("pairs", key)
