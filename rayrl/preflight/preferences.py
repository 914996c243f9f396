"""Checks of the preferences D: the file of pairs, or the oracle and the budget that are to make them."""

import heapq
from dataclasses import dataclass
from typing import TypeVar

from rayrl.algorithms.budget import round_share
from rayrl.algorithms.comparisons import queries_per_pair
from rayrl.config import PreferencesConfig, RunConfig
from rayrl.data.control_tokens import control_tokens
from rayrl.data.pairs import PairCounts, read_pairs
from rayrl.errors import ConfigError, DataError
from rayrl.preflight.inputs import count_tokens, renderer, unread_warnings
from rayrl.preflight.model import ModelFacts

_MEASURED_PAIRS = 2000
"""Pairs that are tokenised: those of the shortest prompts, and the longest. A file this small is measured whole."""
MIN_PROMPTS = 2
"""A reward model is fitted on the pairs of one prompt at least, and checked on those of another."""

T = TypeVar("T", bound=tuple[object, ...])


@dataclass(frozen=True, kw_only=True)
class PairFacts:
    """A file of pairs."""

    counts: PairCounts
    num_cut: int
    """Pairs of which the context cuts an answer, or leaves nothing; of the measured ones."""

    def warnings(self) -> list[str]:
        """Warn of rows that were dropped, of columns that are not read, and of pairs that the context cuts."""
        bad_rows = self.counts.bad_rows
        of_rows = [f"preferences: {bad_rows.in_words()}"] if bad_rows.num else []
        of_rows += unread_warnings("preferences", self.counts)
        if not self.num_cut:
            return of_rows
        return [
            *of_rows,
            f"preferences: the context cuts an answer of {self.num_cut} of {self.counts.num_pairs} pairs, or leaves no "
            "room for one; raise policy.max_model_len if the model allows it",
        ]


def inspect_preferences(config: RunConfig, model: ModelFacts) -> PairFacts | None:
    """Refuse preferences that cannot be had, and return the facts of a file of pairs, which is read once.

    None where the reward model learns from no file of pairs.

    Raises:
        DataError: a table is missing, empty, malformed or lacks a column; a chosen answer equals the rejected one;
            too few pairs.
        ConfigError: the budget or `generate.k` is too small for comparisons, the oracle cannot compare, or no pair of
            the file fits the context.
    """
    preferences = config.preferences
    if preferences is None or config.ppo.reward != "reward_model":
        return None
    if preferences.source == "oracle":
        _check_budget(config, preferences)
        if missing := config.oracle.missing_to_compare(config.rubric):
            raise ConfigError(missing)
        return None
    assert preferences.data is not None, "the config is refused without a file"
    counts = PairCounts()
    # Two heaps, since tokenising a whole file takes minutes: whether any pair fits shows at the shortest prompts, and
    # how many are cut at the longest pairs.
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
            f"lack a prompt or two answers, {counts.num_tied} are tied and {counts.num_other_prompt} have two prompts; "
            "add pairs of other prompts"
        )
    _check_room(config, model, [prompt for _, prompt in shortest], counts)
    return PairFacts(counts=counts, num_cut=_num_cut(config, model, longest))


def _keep(largest: list[T], item: T) -> None:
    """Put an item on a heap of the largest ones, and drop the smallest once there are enough."""
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
    """Count pairs whose prompt, longer answer and end of sequence exceed the context."""
    if model.tokenizer is None or model.max_model_len is None:
        return 0
    prompts = count_tokens(config, model, [prompt for _, prompt, _ in pairs])
    # The control tokens of an answer are ordinary text.
    marked = control_tokens(model.tokenizer).mark_all([answer for *_, answer in pairs])
    answers = model.tokenizer.count_tokens(marked, add_special_tokens=False)
    num_cut = 0
    for prompt, answer in zip(prompts, answers, strict=True):
        num_tokens = prompt + answer + 1  # the end of sequence
        num_cut += num_tokens > model.max_model_len
    return num_cut


def _check_budget(config: RunConfig, preferences: PreferencesConfig) -> None:
    """Refuse a budget or a number of responses that is too small for comparisons."""
    least = MIN_PROMPTS * queries_per_pair(preferences.order)
    # The first round's share is the smallest one that is certain: what a round leaves over goes to later ones.
    if round_share(config.select.budget, 0, config.rounds) < least:
        rounds = f" and rounds is {config.rounds}" if config.rounds > 1 else ""
        raise ConfigError(
            f"select.budget must be at least {(least - 1) * config.rounds + 1} when preferences.order is "
            f'"{preferences.order}"{rounds} ({MIN_PROMPTS} pairs, one to learn from and one to check on), '
            f"got {config.select.budget}; raise it, or lower rounds"
        )
    if config.generate.k < 2 * preferences.pairs_per_prompt:
        raise ConfigError(
            f'generate.k must be at least {2 * preferences.pairs_per_prompt} when preferences.source is "oracle" and '
            f"preferences.pairs_per_prompt is {preferences.pairs_per_prompt}, since two responses to a prompt are "
            f"compared and none of them twice; got {config.generate.k}; raise it, or lower preferences.pairs_per_prompt"
        )
