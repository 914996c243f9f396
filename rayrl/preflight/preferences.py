"""The preference pairs, or whoever is asked for them: is everything there that `gather_preferences` needs?"""

from rayrl.algorithms.budget import round_share
from rayrl.algorithms.comparisons import queries_per_pair
from rayrl.config import HttpOracleConfig, PreferencesConfig, ReplayOracleConfig, RunConfig, ScriptedOracleConfig
from rayrl.data.pairs import PairCounts, read_pairs
from rayrl.data.reading import require_columns
from rayrl.errors import ConfigError, DataError
from rayrl.preflight.inputs import check_module, renderer
from rayrl.preflight.model import ModelFacts

MIN_PROMPTS = 2
"""A reward model is fitted on the pairs of one prompt at least, and checked on those of another."""


def inspect_preferences(config: RunConfig, model: ModelFacts) -> PairCounts | None:
    """Refuse preferences that cannot be had; the counts of a file of pairs, which is read once.

    Raises:
        DataError: a table is missing, empty, malformed or lacks a column; a chosen answer equals the rejected one;
            too few pairs.
        ConfigError: the budget or `generate.k` is too small for comparisons, or the expert cannot compare.
    """
    preferences = config.preferences
    if preferences is None:
        return None
    if preferences.source == "oracle":
        _check_budget(config, preferences)
        _check_expert(config)
        return None
    assert preferences.data is not None, "the config is refused without a file"
    counts = PairCounts()
    for _ in read_pairs(preferences.data, renderer(config, model), counts):
        pass
    if len(counts.prompt_ids) < MIN_PROMPTS:
        raise DataError(
            f"preferences.data.path {preferences.data.path} must hold pairs of at least {MIN_PROMPTS} prompts, and has "
            f"{counts.num_pairs} pairs of {len(counts.prompt_ids)}: of {counts.num_rows} rows {counts.num_unusable} "
            f"lack a prompt or two answers, {counts.num_tied} are tied and {counts.num_other_prompt} have two prompts"
        )
    return counts


def _check_budget(config: RunConfig, preferences: PreferencesConfig) -> None:
    least = MIN_PROMPTS * queries_per_pair(preferences.order)
    if round_share(config.select.budget, 0, config.rounds) < least:
        of_rounds = f" and rounds is {config.rounds}" if config.rounds > 1 else ""
        raise ConfigError(
            f"select.budget must be at least {(least - 1) * config.rounds + 1} when preferences.order is "
            f'"{preferences.order}"{of_rounds} ({MIN_PROMPTS} pairs, one to learn from and one to check on), '
            f"got {config.select.budget}"
        )
    if config.generate.k < 2:
        raise ConfigError(
            'generate.k must be at least 2 when preferences.source is "oracle", since two responses to a prompt are '
            f"compared; got {config.generate.k}"
        )


def _check_expert(config: RunConfig) -> None:
    rubric = config.rubric
    match config.oracle:
        case HttpOracleConfig() if rubric.template is not None and rubric.pairwise_template is None:
            raise ConfigError(
                'rubric.pairwise_template is missing: preferences.source = "oracle" compares two responses, and the '
                f"built-in comparison asks for something else than rubric.template {rubric.template}, by which the "
                "policies are evaluated; write the same criteria to a file with {prompt}, {first} and {second}"
            )
        case ScriptedOracleConfig(compare_function=None):
            raise ConfigError(
                'oracle.compare_function is missing: preferences.source = "oracle" asks which of two responses is '
                'better; name a "module:function" of (prompt, first, second) that returns "first", "second" or "tie"'
            )
        case ScriptedOracleConfig(compare_function=str(function)):
            check_module(function, "oracle.compare_function")
        case ReplayOracleConfig(comparisons_path=None):
            raise ConfigError(
                'oracle.comparisons_path is missing: preferences.source = "oracle" asks which of two responses is '
                "better; name a table with both responses and a preference"
            )
        case ReplayOracleConfig() as replay:
            assert replay.comparisons_path is not None
            needed = [replay.prompt_column, replay.first_column, replay.second_column, replay.preference_column]
            if replay.rationale_column is not None:
                needed.append(replay.rationale_column)
            require_columns(replay.comparisons_path, needed)
