"""Files of an exported model folder beside its weights: configuration, tokenizer, and the ends of a response.

Users load the folder with transformers 5 and 4.57, and serve it with vLLM. All three must read the same model from it.
"""

import json
import shutil
from pathlib import Path
from typing import Any

from rayrl.config import PolicyConfig
from rayrl.data.tokenizing import end_of_turn, load_tokenizer
from rayrl.engines.weight_folder import is_hub_id
from rayrl.runs import storage

TOKENIZER_FILES = (
    *("tokenizer*", "vocab*", "merges.txt", "*.model", "*.spm", "*.tiktoken", "tokenization_*.py"),
    *("special_tokens_map.json", "added_tokens.json", "chat_template*", "additional_chat_templates/*"),
)
"""Names of the files that a tokenizer is read from."""
_LAYER_KINDS = ("full_attention", "sliding_attention")


def complete_folder(folder: Path, policy: PolicyConfig) -> None:
    """Add to a folder of configuration and weights what its users need."""
    _add_old_names(folder / "config.json")
    _copy_tokenizer(policy, folder)
    _stop_at_end_of_turn(policy, folder)


def with_old_names(config: dict[str, Any]) -> dict[str, Any]:
    """Return a model's configuration with its rotary embedding and its experts under the names of transformers 4 too.

    transformers 5 writes one table, `rope_parameters`. transformers 4.57 does not know it, and would take the base of
    10,000 and no scaling, without a word. transformers 5 reads the same from both.
    """
    if "num_local_experts" in config:
        config = {"num_experts": config["num_local_experts"]} | config
    rope: dict[str, Any] | None = config.get("rope_parameters")
    if not rope:
        return config
    has_kinds = any(isinstance(rope.get(kind), dict) for kind in _LAYER_KINDS)
    main: dict[str, Any] = (rope.get("full_attention") or {}) if has_kinds else rope
    if config.get("model_type") == "gpt_neox":
        return config | {"rotary_emb_base": rope["rope_theta"], "rotary_pct": rope["partial_rotary_factor"]}
    old: dict[str, Any] = {"rope_theta": main.get("rope_theta")}
    if has_kinds:
        old["rope_local_base_freq"] = (rope.get("sliding_attention") or {}).get("rope_theta")
    share = main.get("partial_rotary_factor")
    if share is not None:
        old["partial_rotary_factor"] = share
    if main.get("rope_type", "default") != "default":
        apart = ("rope_theta", "partial_rotary_factor")
        old["rope_scaling"] = {name: value for name, value in main.items() if name not in apart}
    return config | {name: value for name, value in old.items() if value is not None}


def _add_old_names(file: Path) -> None:
    config: dict[str, Any] = json.loads(file.read_text())
    # As transformers writes it.
    file.write_text(json.dumps(with_old_names(config), indent=2, sort_keys=True) + "\n")


def _copy_tokenizer(policy: PolicyConfig, folder: Path) -> None:
    """Copy the policy's tokenizer as it is.

    A tokenizer that transformers 5 writes names a class that 4.57 does not know, and settings in another form.
    """
    source = storage.local_folder(policy.path)
    if is_hub_id(source):
        from huggingface_hub import constants, snapshot_download

        source = snapshot_download(
            source,
            revision=policy.revision,
            allow_patterns=list(TOKENIZER_FILES),
            local_files_only=bool(constants.HF_HUB_OFFLINE),
        )
    for pattern in TOKENIZER_FILES:
        for file in sorted(Path(source).glob(pattern)):
            copy = folder / file.relative_to(source)
            copy.parent.mkdir(exist_ok=True)
            if file.is_file():
                shutil.copyfile(file, copy)
    settings_file = folder / "tokenizer_config.json"
    if settings_file.exists():
        settings: dict[str, Any] = json.loads(settings_file.read_text())
        if settings.get("tokenizer_class") == "TokenizersBackend":  # transformers 5's name of the class
            settings["tokenizer_class"] = "PreTrainedTokenizerFast"
            settings_file.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n")


def _stop_at_end_of_turn(policy: PolicyConfig, folder: Path) -> None:
    """List the token that ends a response among those at which generation stops."""
    file = folder / "generation_config.json"
    settings: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
    known = settings.get("eos_token_id")
    if known is None:
        known = json.loads((folder / "config.json").read_text()).get("eos_token_id")
    ends: list[int] = [] if known is None else known if isinstance(known, list) else [known]
    end = end_of_turn(load_tokenizer(policy), policy.prompt_format)
    if end not in ends:
        settings["eos_token_id"] = [*ends, end]
        file.write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n")
