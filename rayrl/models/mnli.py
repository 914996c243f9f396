"""The entailment model: a sequence classifier with the three labels of MNLI, in whatever order and case it has them."""

import os
from collections.abc import Mapping
from typing import Any

from rayrl.algorithms.clustering import CONTRADICTION, ENTAILMENT, NEUTRAL
from rayrl.errors import ConfigError
from rayrl.runs.storage import local_folder

MNLI = {"contradiction": CONTRADICTION, "neutral": NEUTRAL, "entailment": ENTAILMENT}


def label_order(path: str) -> list[int]:
    """What each of a model's outputs means, as one of 0, 1, 2.

    Raises:
        ConfigError: there is no such model, or its labels are not MNLI's.
    """
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(local_folder(path), local_files_only=_offline())
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"refresh.spg.entailment_model must be a model's folder or a hub id, got {path}: {error}; correct it, "
            "or download the model and give its folder"
        ) from None
    return check_labels(config.id2label or {}, path)


def check_labels(id2label: Mapping[Any, str], path: str) -> list[int]:
    """What each output means, as one of 0, 1, 2, given the names a model's config.json has for them.

    Raises:
        ConfigError: they are not MNLI's.
    """
    ordered = [id2label[output] for output in sorted(id2label, key=int)]
    if sorted(name.lower() for name in ordered) != sorted(MNLI):
        raise ConfigError(
            f"refresh.spg.entailment_model must have the labels {', '.join(MNLI)}, got {path} with "
            f"{', '.join(ordered) or 'none'}; name a model trained on MNLI, or correct id2label in its config.json"
        )
    return [MNLI[name.lower()] for name in ordered]


def load_entailment(path: str, dtype: Any) -> tuple[Any, Any]:
    """The model, from safetensors only and with every weight it needs, and its tokenizer.

    Raises:
        ConfigError: there is no such model, or its classifier was never trained.
    """
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    folder, is_offline = local_folder(path), _offline()
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
    if loaded["missing_keys"]:
        raise ConfigError(
            f"refresh.spg.entailment_model must be a trained sequence classifier, got {path}, which has no weights for "
            f"{', '.join(sorted(loaded['missing_keys'])[:4])}; fine-tune it on MNLI, or name another"
        )
    return model.eval(), tokenizer


def _offline() -> bool:
    return os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")
