"""The user's files, read once: is everything there, how many prompts, and do they fit the context?"""

import heapq
import importlib.util
import os
from dataclasses import dataclass
from pathlib import Path

from rayrl.config import DataConfig, HttpOracleConfig, ReplayOracleConfig, RunConfig, ScriptedOracleConfig
from rayrl.data import tokenizing
from rayrl.data.chats import Messages
from rayrl.data.reading import (
    PromptCounts,
    Render,
    columns_of,
    read_prompts,
    read_seed_rows,
    require_columns,
)
from rayrl.errors import ConfigError, DataError
from rayrl.oracles.keys import read_key
from rayrl.preflight.model import ModelFacts

_MEASURED_PROMPTS = 2000
"""Prompts that are tokenised: the longest of the pool, in characters. A pool this small is measured whole."""
_CHARACTERS_PER_TOKEN = 4


@dataclass(frozen=True, kw_only=True)
class PoolFacts:
    """What the checks need to know about the pool."""

    counts: PromptCounts
    mean_tokens: float
    longest_tokens: int
    """Tokens of the longest prompt; 0 without a tokenizer."""
    num_cut: int
    """Prompts that leave less than generate.max_tokens of the context."""


def inspect_pool(config: RunConfig, model: ModelFacts) -> PoolFacts:
    """Read the pool once; memory holds the longest prompts only.

    Raises:
        DataError: missing, empty, malformed, or without the column.
        ConfigError: a prompt fills the context.
    """
    counts = PromptCounts()
    longest: list[tuple[int, str]] = []
    num_characters = 0
    for prompt in read_prompts(config.pool, renderer(config, model), counts):
        num_characters += len(prompt.rendered)
        item = (len(prompt.rendered), prompt.rendered)
        if len(longest) < _MEASURED_PROMPTS:
            heapq.heappush(longest, item)
        else:
            heapq.heappushpop(longest, item)
    if counts.num_kept == 0:
        raise DataError(f"pool.path {config.pool.path} has no prompt that is not empty ({counts.num_rows} rows)")
    mean_characters = num_characters / counts.num_kept
    if model.tokenizer is None:
        return PoolFacts(
            counts=counts, mean_tokens=mean_characters / _CHARACTERS_PER_TOKEN, longest_tokens=0, num_cut=0
        )
    num_tokens = count_tokens(config, model, [text for _, text in longest])
    tokens_per_character = sum(num_tokens) / sum(length for length, _ in longest)
    return PoolFacts(
        counts=counts,
        mean_tokens=mean_characters * tokens_per_character,
        longest_tokens=max(num_tokens),
        num_cut=_check_lengths(config, model, num_tokens, counts.num_kept),
    )


def count_tokens(config: RunConfig, model: ModelFacts, rendered: list[str]) -> list[int]:
    """Tokens of rendered prompts; an estimate where the tokenizer is unknown."""
    if model.tokenizer is None:
        return [len(text) // _CHARACTERS_PER_TOKEN for text in rendered]
    is_plain = tokenizing.resolve_format(model.tokenizer, config.policy.prompt_format) == "plain"
    return model.tokenizer.count_tokens(rendered, add_special_tokens=is_plain)


def _check_lengths(config: RunConfig, model: ModelFacts, num_tokens: list[int], num_prompts: int) -> int:
    """Refuse prompts without room for one token; the number of those whose responses may be cut."""
    if model.max_model_len is None:
        return 0
    num_too_long = sum(n >= model.max_model_len for n in num_tokens)
    if num_too_long:
        at_least = "at least " if num_too_long == _MEASURED_PROMPTS else ""
        raise ConfigError(
            f"pool.path: a prompt must be shorter than the context of {model.max_model_len} tokens, but "
            f"{at_least}{num_too_long} of {num_prompts} are not; the longest has {max(num_tokens)}. "
            "Shorten or remove them, or raise policy.max_model_len if the model allows it"
        )
    return sum(n + config.generate.max_tokens > model.max_model_len for n in num_tokens)


def renderer(config: RunConfig, model: ModelFacts) -> Render:
    """What the policy reads of a prompt; an approximation where its tokenizer is unknown."""

    def render(source: str | Messages) -> str:
        if model.tokenizer is not None:
            return tokenizing.render(model.tokenizer, config.policy.prompt_format, source)
        return source if isinstance(source, str) else "\n".join(m["content"] for m in source)

    return render


def inspect_seed_data(config: RunConfig, model: ModelFacts) -> PromptCounts | None:
    """Refuse seed data that trains nothing; its counts (of all rows only where they are queried).

    Raises:
        DataError: missing, empty, malformed, without a column, or no row passes.
    """
    if config.seed_data is None:
        return None
    counts = PromptCounts()
    for _ in read_seed_rows(config.seed_data, renderer(config, model), counts):
        if config.generate.source != "seed":
            break
    if counts.num_kept == 0:
        raise DataError(
            f"seed_data.path {config.seed_data.path} has no usable row: of {counts.num_rows}, "
            f"{counts.num_empty} lack a prompt or response and {counts.num_below_score} score below "
            "seed_data.min_score"
        )
    return counts


def inspect_others(config: RunConfig) -> None:
    """Refuse missing reference answers, benchmark tasks, and oracle inputs, without touching the network.

    Raises:
        DataError: a table is missing or lacks a column.
        ConfigError: a key, module or folder is missing.
    """
    answers: DataConfig | None = config.evaluate.reference_answers
    if answers is not None:
        require_columns(answers.path, columns_of(answers), answers.split)
    lm_eval = config.evaluate.lm_eval
    if lm_eval.tasks and importlib.util.find_spec("lm_eval") is None:
        raise ConfigError('evaluate.lm_eval.tasks needs lm-evaluation-harness; pip install "rayrl[lm-eval]"')
    if lm_eval.include_path is not None and not os.path.isdir(lm_eval.include_path):
        raise ConfigError(f"evaluate.lm_eval.include_path must be a folder, got {lm_eval.include_path}")
    if config.pipeline == "rlp" and config.ppo.function is not None:
        check_module(config.ppo.function, "ppo.function")
    match config.oracle:
        case HttpOracleConfig():
            read_key(config.oracle.api_key_env)
        case ScriptedOracleConfig():
            check_module(config.oracle.function, "oracle.function")
            if config.oracle.compare_function is not None:
                check_module(config.oracle.compare_function, "oracle.compare_function")
        case ReplayOracleConfig(path=None) if config.asks_for_judgements:
            raise ConfigError(
                "oracle.path is missing: single responses are judged here (to label them, or to evaluate), and a table "
                "of comparisons judges none; name a table of judgements, or set evaluate.budget = 0 if only that asks"
            )
        case ReplayOracleConfig() as replay:
            if replay.path is not None:
                require_columns(replay.path, replay.judgement_columns)
            if replay.comparisons_path is not None:
                require_columns(replay.comparisons_path, replay.comparison_columns)


def check_module(function: str, setting: str) -> None:
    """Refuse a "module:function" whose module is not here.

    Only the top-level name is looked for: importing the user's code may take long.
    """
    top = function.partition(":")[0].partition(".")[0]
    here = Path.cwd() / top
    if not (here.is_dir() or here.with_suffix(".py").is_file() or importlib.util.find_spec(top)):
        raise ConfigError(f"{setting} must be importable from {Path.cwd()}, got {function}: there is no module {top}")
