"""The preference pairs, or whoever is asked for them: is everything there that `gather_preferences` needs?"""

import heapq
from dataclasses import dataclass
from typing import Any

from rayrl.algorithms.budget import round_share
from rayrl.algorithms.comparisons import queries_per_pair
from rayrl.config import HttpOracleConfig, PreferencesConfig, ReplayOracleConfig, RunConfig, ScriptedOracleConfig
from rayrl.data.pairs import PairCounts, read_pairs
from rayrl.errors import ConfigError, DataError
from rayrl.preflight.inputs import count_tokens, renderer
from rayrl.preflight.model import ModelFacts

_MEASURED_PAIRS = 2000
"""Pairs that are tokenised: those of the shortest prompts, and the longest. A file this small is measured whole."""
MIN_PROMPTS = 2
"""A reward model is fitted on the pairs of one prompt at least, and checked on those of another."""


@dataclass(frozen=True, kw_only=True)
class PairFacts:
    """A file of pairs."""

    counts: PairCounts
    num_cut: int
    """Pairs of which the context cuts an answer, or leaves nothing; of the measured ones."""

    def warnings(self) -> list[str]:
        """What a user should know of it."""
        if not self.num_cut:
            return []
        return [
            f"preferences: the context cuts an answer of {self.num_cut} of {self.counts.num_pairs} pairs, or leaves no "
            "room for one; raise policy.max_model_len if the model allows it"
        ]


def inspect_preferences(config: RunConfig, model: ModelFacts) -> PairFacts | None:
    """Refuse preferences that cannot be had; the facts of a file of pairs, which is read once.

    Raises:
        DataError: a table is missing, empty, malformed or lacks a column; a chosen answer equals the rejected one;
            too few pairs.
        ConfigError: the budget or `generate.k` is too small for comparisons, the expert cannot compare, or no pair of
            the file fits the context.
    """
    preferences = config.preferences
    if preferences is None or config.ppo.reward != "reward_model":
        return None
    if preferences.source == "oracle":
        _check_budget(config, preferences)
        _check_expert(config)
        return None
    assert preferences.data is not None, "the config is refused without a file"
    counts = PairCounts()
    shortest: list[tuple[int, str]] = []
    longest: list[tuple[int, str, str]] = []
    for prompt, chosen, rejected in read_pairs(preferences.data, renderer(config, model), counts):
        answer = max(chosen.text, rejected.text, key=len)
        _keep(shortest, (-len(prompt.rendered), prompt.rendered))
        _keep(longest, (len(prompt.rendered) + len(answer), prompt.rendered, answer))
    if len(counts.prompt_ids) < MIN_PROMPTS:
        raise DataError(
            f"preferences.data.path {preferences.data.path} must hold pairs of at least {MIN_PROMPTS} prompts, and has "
            f"{counts.num_pairs} pairs of {len(counts.prompt_ids)}: of {counts.num_rows} rows {counts.num_unusable} "
            f"lack a prompt or two answers, {counts.num_tied} are tied and {counts.num_other_prompt} have two prompts"
        )
    _check_room(config, model, [prompt for _, prompt in shortest], counts)
    return PairFacts(counts=counts, num_cut=_num_cut(config, model, longest))


def _keep(largest: list[Any], item: Any) -> None:
    """Put an item on a heap of the largest ones."""
    if len(largest) < _MEASURED_PAIRS:
        heapq.heappush(largest, item)
    else:
        heapq.heappushpop(largest, item)


def _check_room(config: RunConfig, model: ModelFacts, prompts: list[str], counts: PairCounts) -> None:
    """Refuse a file whose shortest prompts leave no room for an answer."""
    if model.tokenizer is None or model.max_model_len is None:
        return
    shortest = min(count_tokens(config, model, prompts))
    if shortest >= model.max_model_len:
        assert config.preferences is not None and config.preferences.data is not None
        raise ConfigError(
            f"preferences.data.path: a prompt must be shorter than the context of {model.max_model_len} tokens, but "
            f"none of the {counts.num_pairs} pairs in {config.preferences.data.path} has one; the shortest has "
            f"{shortest}. Shorten them, or raise policy.max_model_len if the model allows it"
        )


def _num_cut(config: RunConfig, model: ModelFacts, pairs: list[tuple[int, str, str]]) -> int:
    """Pairs whose prompt, longer answer and end of sequence exceed the context."""
    if model.tokenizer is None or model.max_model_len is None:
        return 0
    prompts = count_tokens(config, model, [prompt for _, prompt, _ in pairs])
    answers = model.tokenizer.count_tokens([answer for *_, answer in pairs], add_special_tokens=False)
    limit = model.max_model_len
    return sum(prompt + answer + 1 > limit for prompt, answer in zip(prompts, answers, strict=True))


def _check_budget(config: RunConfig, preferences: PreferencesConfig) -> None:
    least = MIN_PROMPTS * queries_per_pair(preferences.order)
    if round_share(config.select.budget, 0, config.rounds) < least:
        of_rounds = f" and rounds is {config.rounds}" if config.rounds > 1 else ""
        raise ConfigError(
            f"select.budget must be at least {(least - 1) * config.rounds + 1} when preferences.order is "
            f'"{preferences.order}"{of_rounds} ({MIN_PROMPTS} pairs, one to learn from and one to check on), '
            f"got {config.select.budget}"
        )
    if config.generate.k < 2 * preferences.pairs_per_prompt:
        raise ConfigError(
            f'generate.k must be at least {2 * preferences.pairs_per_prompt} when preferences.source is "oracle" and '
            f"preferences.pairs_per_prompt is {preferences.pairs_per_prompt}, since two responses to a prompt are "
            f"compared and none of them twice; got {config.generate.k}"
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
        case ReplayOracleConfig(comparisons_path=None):
            raise ConfigError(
                'oracle.comparisons_path is missing: preferences.source = "oracle" asks which of two responses is '
                "better; name a table with both responses and a preference"
            )
