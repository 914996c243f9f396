"""Entailment model: a sequence classifier with the three labels of MNLI, in any order and case.

A model with other labels, or whose classifier was never trained, is refused with the setting that names it.
"""

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING

from rayrl.algorithms.clustering import CONTRADICTION, ENTAILMENT, NEUTRAL
from rayrl.errors import ConfigError
from rayrl.runs.storage import local_folder

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

MNLI = {"contradiction": CONTRADICTION, "neutral": NEUTRAL, "entailment": ENTAILMENT}
MAX_SHOWN = 4
"""Names of missing weights in a message."""


def label_order(path: str) -> list[int]:
    """Return the meaning of each output of the model in a folder or on the hub: 0, 1 or 2, as in `MNLI`.

    Raises:
        ConfigError: there is no such model, or its labels are not MNLI's.
    """
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(local_folder(path), local_files_only=_is_offline())
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"refresh.spg.entailment_model must be a model's folder or a hub id, got {path}: {error}; correct it, "
            "or download the model and give its folder"
        ) from None
    return check_labels(config.id2label or {}, path)


def check_labels(id2label: Mapping[int, str] | Mapping[str, str], path: str) -> list[int]:
    """Return the meaning of each output, 0, 1 or 2, given the names that a model's config.json has for them.

    Raises:
        ConfigError: they are not MNLI's.
    """
    by_output = {int(output): name for output, name in id2label.items()}  # JSON has the numbers as strings
    ordered = [by_output[output] for output in sorted(by_output)]
    if sorted(name.lower() for name in ordered) != sorted(MNLI):
        raise ConfigError(
            f"refresh.spg.entailment_model must have the labels {', '.join(MNLI)}, got {path} with "
            f"{', '.join(ordered) or 'none'}; name a model trained on MNLI, or correct id2label in its config.json"
        )
    return [MNLI[name.lower()] for name in ordered]


def load_entailment(path: str, dtype: "torch.dtype") -> tuple["PreTrainedModel", "PreTrainedTokenizerBase"]:
    """Load the model and its tokenizer from a folder or the hub; from safetensors only, and with every weight it needs.

    Raises:
        ConfigError: there is no such model, or its classifier was never trained.
    """
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    folder, is_offline = local_folder(path), _is_offline()
    try:
        model, loaded = AutoModelForSequenceClassification.from_pretrained(
            folder, dtype=dtype, use_safetensors=True, local_files_only=is_offline, output_loading_info=True
        )
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=is_offline)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"refresh.spg.entailment_model must be a sequence classifier saved as safetensors with its tokenizer, "
            f"got {path}: {error}"
        ) from None
    # transformers fills missing weights with random numbers, and only warns.
    missing = sorted(loaded["missing_keys"])
    if missing:
        raise ConfigError(
            f"refresh.spg.entailment_model must be a trained sequence classifier, got {path}, which has no weights for "
            f"{', '.join(missing[:MAX_SHOWN])}; fine-tune it on MNLI, or name another"
        )
    return model.eval(), tokenizer


def _is_offline() -> bool:
    return os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")
