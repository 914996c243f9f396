"""Inputs of a run: the user's files, each read once, and the keys, modules and packages that the run needs.

Nothing here uses the network or imports the user's code.
"""

import heapq
import importlib.util
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from rayrl.config import ReferenceAnswersConfig, RunConfig
from rayrl.data import tokenizing
from rayrl.data.chats import conversation_text
from rayrl.data.pairs import PairCounts
from rayrl.data.reading import (
    PromptCounts,
    Render,
    Room,
    read_prompts,
    read_reference_answers,
    read_seed_rows,
)
from rayrl.errors import ConfigError, DataError
from rayrl.oracles.keys import read_secret
from rayrl.oracles.user_modules import check_function
from rayrl.preflight.model import ModelFacts
from rayrl.records import Prompt
from rayrl.runs import storage
from rayrl.runs.stage_table import stages_of

_MEASURED_PROMPTS = 2000
"""Prompts that are tokenised: the longest of the pool, in characters. A pool this small is measured whole."""
_CHARACTERS_PER_TOKEN = 4
_TEST_PROMPTS = 3
"""Prompts that the oracle is tried out on: the second only if nobody can read its answer about the first."""


@dataclass(frozen=True, kw_only=True)
class PoolFacts:
    """Facts of the pool that the checks need."""

    counts: PromptCounts
    first: tuple[Prompt, ...]
    """The first prompts, as many as the oracle is tried out on."""
    longest: tuple[Prompt, ...]
    """The longest prompts, in characters: all of a pool of at most `_MEASURED_PROMPTS`."""
    mean_tokens: float
    longest_tokens: int
    """Tokens of the longest prompt; 0 without a tokenizer."""
    num_cut: int
    """Prompts that leave less than generate.max_tokens of the context."""


def inspect_pool(config: RunConfig, model: ModelFacts) -> PoolFacts:
    """Count the prompts of the pool, and measure the longest. The pool is read once, and never held in memory whole.

    Raises:
        DataError: missing, empty, malformed, without the column, or a prompt fills the context.
    """
    counts = PromptCounts()
    # A heap of the longest prompts: whether a prompt fits the context shows at these, and tokenising all takes minutes.
    longest: list[tuple[int, str, Prompt]] = []
    num_characters = 0
    first: list[Prompt] = []
    for prompt in _pool_prompts(config, model, counts):
        if len(first) < _TEST_PROMPTS:
            first.append(prompt)
        num_characters += len(prompt.rendered)
        item = (len(prompt.rendered), prompt.id, prompt)  # ids differ: no two prompts are compared themselves
        if len(longest) < _MEASURED_PROMPTS:
            heapq.heappush(longest, item)
        else:
            heapq.heappushpop(longest, item)
    if counts.num_kept == 0:
        raise DataError(
            f"pool.path {config.pool.path} has no prompt that is not empty ({counts.num_rows} rows"
            f"{_dropped(counts)}); add prompts, or correct pool.prompt_column"
        )
    mean_characters = num_characters / counts.num_kept
    if model.tokenizer is None:
        return PoolFacts(
            counts=counts,
            first=tuple(first),
            longest=tuple(prompt for _, _, prompt in longest),
            mean_tokens=mean_characters / _CHARACTERS_PER_TOKEN,
            longest_tokens=0,
            num_cut=0,
        )
    num_tokens = count_tokens(config, model, [prompt.rendered for _, _, prompt in longest])
    num_characters_measured = sum(length for length, _, _ in longest)
    tokens_per_character = sum(num_tokens) / num_characters_measured
    return PoolFacts(
        counts=counts,
        first=tuple(first),
        longest=tuple(prompt for _, _, prompt in longest),
        mean_tokens=mean_characters * tokens_per_character,
        longest_tokens=max(num_tokens),
        num_cut=_num_cut(config, model, num_tokens),
    )


def check_held_out(config: RunConfig, counts: PromptCounts) -> None:
    """Refuse to hold out all prompts, or more.

    Raises:
        ConfigError: says where prompts were lost.
    """
    if config.pool.num_eval < counts.num_kept:
        return
    lost = [f"pool.limit = {config.pool.limit} reads no more"] if config.pool.limit else []
    lost += [f"{counts.num_duplicate:,} of {counts.num_rows:,} rows repeat another's"] if counts.num_duplicate else []
    lost += [f"{counts.num_empty:,} rows are empty"] if counts.num_empty else []
    raise ConfigError(
        f"pool.num_eval must be below the number of prompts in the pool, {counts.num_kept:,}"
        f"{' (' + '; '.join(lost) + ')' if lost else ''}, got {config.pool.num_eval}; hold fewer out, or add prompts"
        f"{', or raise pool.limit' if config.pool.limit else ''}"
    )


def count_tokens(config: RunConfig, model: ModelFacts, rendered: list[str]) -> list[int]:
    """Count the tokens of rendered prompts; estimate them where the tokenizer is unknown."""
    if model.tokenizer is None:
        return [len(text) // _CHARACTERS_PER_TOKEN for text in rendered]
    # A chat template writes the special tokens itself.
    is_plain = tokenizing.resolve_format(model.tokenizer, config.policy.prompt_format) == "plain"
    return model.tokenizer.count_tokens(rendered, add_special_tokens=is_plain)


def _pool_prompts(config: RunConfig, model: ModelFacts, counts: PromptCounts) -> Iterator[Prompt]:
    """Read the pool as the run will; without a tokenizer its lengths are not checked."""
    room = None
    if model.tokenizer is not None and model.max_model_len is not None:
        room = Room(
            num_tokens=model.max_model_len,
            count_tokens=lambda rendered: count_tokens(config, model, [rendered])[0],
        )
    try:
        yield from read_prompts(config.pool, renderer(config, model), counts, room)
    except DataError as error:
        raise DataError(f"pool.path: {error}") from None


def _dropped(counts: PromptCounts) -> str:
    return f"; {counts.bad_rows.in_words()}" if counts.bad_rows.num else ""


def _num_cut(config: RunConfig, model: ModelFacts, num_tokens: list[int]) -> int:
    """Count the prompts whose responses may be cut."""
    if model.max_model_len is None:
        return 0
    return sum(n + config.generate.max_tokens > model.max_model_len for n in num_tokens)


def renderer(config: RunConfig, model: ModelFacts) -> Render:
    """Make the function that renders a prompt for the policy; it approximates where the tokenizer is unknown."""
    if model.tokenizer is not None:
        return tokenizing.renderer_of(model.tokenizer, config.policy)
    return lambda source: source if isinstance(source, str) else conversation_text(source)


def inspect_seed_data(config: RunConfig, model: ModelFacts) -> PromptCounts | None:
    """Refuse seed data that the run would refuse, or that has no usable row, and count its rows.

    Raises:
        DataError: missing, empty, malformed, without a column, a bad row, or no row passes.
    """
    if config.seed_data is None:
        return None
    counts = PromptCounts()
    turns = "last" if config.generate.source == "seed" else config.sft.turns
    _read_to_the_end(read_seed_rows(config.seed_data, renderer(config, model), counts, turns=turns), "seed_data.path")
    if counts.num_kept == 0:
        raise DataError(
            f"seed_data.path {config.seed_data.path} has no usable row: of {counts.num_rows}, "
            f"{counts.num_empty} lack a prompt or response, {counts.num_without_score} have no score"
            f"{_dropped(counts)} and {counts.num_below_score} score below "
            "seed_data.min_score; lower seed_data.min_score, or complete the rows"
        )
    return counts


def _read_to_the_end(rows: Iterable[object], setting: str) -> None:
    """Read all rows, as the run will; a row that is refused is told with the setting that names its file.

    Raises:
        DataError: a row, or the file itself, cannot be used.
    """
    try:
        for _ in rows:
            pass
    except DataError as error:
        raise DataError(f"{setting}: {error}") from None


def unread_warnings(name: str, counts: PromptCounts | PairCounts) -> list[str]:
    """Warn of columns that hold something and are not read."""
    return [
        f"{name}: {num_rows} rows hold something in the column {column}, which is not read: neither the policy nor the "
        "oracle sees it"
        for column, num_rows in counts.unread_columns.items()
    ]


def inspect_others(config: RunConfig, model: ModelFacts) -> PromptCounts | None:
    """Refuse missing trackers, reference answers, benchmark tasks, functions and keys, without the network.

    Returns:
        Counts of the reference answers, if there are any.

    Raises:
        DataError: the table of reference answers is missing, lacks a column, or has a bad row or no answer.
        ConfigError: a key, module or folder is missing.
    """
    _inspect_tracking(config)
    answers = config.evaluate.reference_answers
    references = None if answers is None else _inspect_reference_answers(answers, renderer(config, model))
    lm_eval = config.evaluate.lm_eval
    if lm_eval.tasks and importlib.util.find_spec("lm_eval") is None:
        raise ConfigError(
            f"evaluate.lm_eval.tasks needs lm-evaluation-harness, which is not installed here, got {lm_eval.tasks}; "
            "pip install lm_eval, or empty the list"
        )
    if lm_eval.include_path is not None and not os.path.isdir(lm_eval.include_path):
        raise ConfigError(
            f"evaluate.lm_eval.include_path must be a folder, got {lm_eval.include_path}; correct it, or leave it out"
        )
    _inspect_quantization(config)
    if config.pipeline == "rlp" and config.ppo.function is not None:
        check_function(config.ppo.function, "ppo.function")
    _inspect_oracle(config)
    return references


def _inspect_reference_answers(answers: ReferenceAnswersConfig, render: Render) -> PromptCounts:
    counts = PromptCounts()
    _read_to_the_end(read_reference_answers(answers, render, counts), "evaluate.reference_answers.path")
    if counts.num_kept == 0:
        raise DataError(
            f"evaluate.reference_answers.path {answers.path} has no row with a prompt and an answer "
            f"({counts.num_rows} rows{_dropped(counts)}); complete the rows, or correct the columns"
        )
    return counts


def _inspect_oracle(config: RunConfig) -> None:
    """Refuse an oracle whose key or functions are missing, or that cannot judge where the run needs it to."""
    oracle = config.oracle
    # Keys are read to see that they are there; they are kept nowhere.
    for setting, source in oracle.secret_sources().items():
        read_secret(source, setting)
    for setting, function in oracle.functions().items():
        check_function(function, setting)
    if config.asks_for_judgements and (missing := oracle.missing_to_judge()):
        raise ConfigError(missing)


def _inspect_quantization(config: RunConfig) -> None:
    """Refuse weights in 4 bits without the package that has them."""
    for stage, _ in stages_of(config):
        training = stage.training(config)
        is_quantized = training is not None and training.settings.is_quantized
        if is_quantized and importlib.util.find_spec("bitsandbytes") is None:
            raise ConfigError(
                f'lora.quantization = "nf4" ({stage.name}) needs the package bitsandbytes, which is '
                'not installed here; pip install "rayrl[qlora]", or leave it out'
            )


def _inspect_tracking(config: RunConfig) -> None:
    """Refuse a tracker whose package or key is missing, or whose files cannot be where the run is."""
    wandb, mlflow = config.tracking.wandb, config.tracking.mlflow
    for name, tracker in (("wandb", wandb), ("mlflow", mlflow)):
        if tracker is not None and importlib.util.find_spec(name) is None:
            raise ConfigError(
                f"tracking.{name} needs the package {name}, which is not installed here; "
                f"pip install {name}, or leave the table out"
            )
    if wandb is not None and wandb.mode == "online" and not (os.environ.get("WANDB_API_KEY") or _has_netrc()):
        raise ConfigError(
            'tracking.wandb.mode = "online" needs a key in the environment variable WANDB_API_KEY or in ~/.netrc of '
            'the node that runs the job, and there is none; put it there, or set mode = "offline"'
        )
    if storage.is_local(config.run_dir):
        return
    # Both trackers write plain files, which a bucket cannot take while they grow.
    writes_files = "as it is writes files into run_dir, which must then be on a filesystem"
    if wandb is not None and wandb.mode == "offline":
        raise ConfigError(f'tracking.wandb.mode {writes_files}, got {config.run_dir}; set it to "online"')
    if mlflow is not None and mlflow.tracking_uri is None:
        raise ConfigError(
            f"tracking.mlflow.tracking_uri {writes_files}, got {config.run_dir}; set it to your server's address"
        )


def _has_netrc() -> bool:
    return any((Path.home() / name).is_file() for name in (".netrc", "_netrc"))
