"""Checks of a ready-made reward model, which the run's embedding replicas are to serve.

The replicas take its weights in place of the policy's, and its inputs are the policy's token ids. So it must have the
policy's shape and its tokenizer, and a head with one output.
"""

from typing import Any

from tokenizers import Tokenizer

from rayrl.config import RunConfig
from rayrl.errors import ConfigError
from rayrl.preflight.model import model_folder
from rayrl.preflight.weights import read_json_file
from rayrl.runs import storage

_SETTING = "reward_model.path"
_HEAD = "head/head.safetensors"
_SHAPE = (
    "model_type",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "intermediate_size",
    "vocab_size",
)
"""Settings that two models must share for one to take the other's weights."""
_REMEDY = "give the checkpoint of a fit_reward_model stage that started from this policy, or leave it out to fit one"


def inspect_reward_model(config: RunConfig, *, online: bool = False) -> None:
    """Refuse a ready-made reward model that cannot be served beside the policy; without one, do nothing.

    Nothing is known of a policy on the hub that is not in the cache yet, unless `online`.

    Raises:
        ConfigError: no such folder, no head, several outputs, another architecture, or another tokenizer.
    """
    path = config.reward_model.path
    if path is None:
        return
    folder = model_folder(path, None, online=False, setting=_SETTING)
    if folder is None:
        raise ConfigError(
            f"{_SETTING} must be a folder written by rayrl, got {path}: there is no such folder; {_REMEDY}"
        )
    own = _config(folder, _SETTING)
    _check_head(folder, own)
    # Its shape can be compared only where the policy's config.json is at hand.
    policy = model_folder(config.policy.path, config.policy.revision, online=online, setting="policy.path")
    if policy is None:
        return
    theirs = _config(policy, "policy.path")
    for name in _SHAPE:
        # A setting that is left out follows from the others (head_dim from hidden_size, for one).
        if name in own and name in theirs and own[name] != theirs[name]:
            raise ConfigError(
                f"{_SETTING} must be a model of the policy's shape, and has {name} {own[name]} where "
                f"{config.policy.path} has {theirs[name]}, got {path}; {_REMEDY}"
            )
    own_ids, their_ids = _vocabulary(folder), _vocabulary(policy)
    if own_ids is not None and their_ids is not None and own_ids != their_ids:
        raise ConfigError(
            f"{_SETTING} must have the policy's tokenizer (it is given token ids), and its tokenizer.json gives tokens "
            f"other ids than that of {config.policy.path}, got {path}; {_REMEDY}"
        )


def _config(folder: str, setting: str) -> dict[str, Any]:
    """Read config.json; the settings of a multimodal model's language model come first."""
    config = read_json_file(storage.join(folder, "config.json"), setting)
    return config | (config.get("text_config") or {})


def _check_head(folder: str, config: dict[str, Any]) -> None:
    """Refuse a folder without a head, and a head of another form."""
    from safetensors.numpy import load

    path = storage.join(folder, _HEAD)
    if not storage.exists(path):
        labels = config.get("id2label")
        what = f"a classifier of {len(labels)} outputs" if labels else "a model without one"
        raise ConfigError(f"{_SETTING} must hold a head with one output in {_HEAD}, got {folder}, {what}; {_REMEDY}")
    weight = load(storage.read_bytes(path))["weight"]
    if weight.shape[0] != 1:
        raise ConfigError(f"{_SETTING} must have a head with one output, got {weight.shape[0]} in {folder}; {_REMEDY}")
    if weight.shape[1] != config["hidden_size"]:
        raise ConfigError(
            f"{_SETTING} must have a head as wide as its model ({config['hidden_size']}), got {weight.shape[1]} in "
            f"{folder}; {_REMEDY}"
        )


def _vocabulary(folder: str) -> dict[str, int] | None:
    """Read the ids of all tokens; None where there is no tokenizer.json."""
    path = storage.join(folder, "tokenizer.json")
    if not storage.exists(path):
        return None
    return Tokenizer.from_buffer(storage.read_bytes(path)).get_vocab(with_added_tokens=True)
