"""Tokenizers: what the policy reads, and the tokens of prompts and of given responses.

Prompt and response are tokenised apart: training must see exactly the prefix that generation was conditioned
on, and tokenising the two together could merge the last token of one with the first of the other.
"""

import json
import os
from typing import TYPE_CHECKING, Any, Literal, Protocol

from rayrl.config import PolicyConfig
from rayrl.data.chats import Messages
from rayrl.errors import ConfigError, DataError
from rayrl.runs import storage

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Format = Literal["plain", "chat"]

_ANCHORS = ("\n", "a", ":")


class ChatTemplate(Protocol):
    """The part of a tokenizer that renders chats."""

    @property
    def chat_template(self) -> Any: ...

    def apply_chat_template(self, conversation: Messages, **options: Any) -> Any: ...


def load_tokenizer(policy: PolicyConfig) -> "PreTrainedTokenizerBase":
    """The policy's tokenizer, from a folder, a URL or the hub; one without a padding token pads with EOS.

    Raises:
        ConfigError: no model folder, no tokenizer in it, no EOS token, or not to be had from the hub.
    """
    from transformers import AutoTokenizer

    path = storage.local_folder(policy.path)
    if os.path.isdir(path) and not os.path.isfile(os.path.join(path, "config.json")):
        raise ConfigError(f"policy.path must be a model folder with a config.json, got {policy.path}")
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            path,
            revision=policy.revision,
            trust_remote_code=policy.trust_remote_code,
            local_files_only=os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"),
        )
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"policy.path must name a model with a tokenizer, got {policy.path}: {error}; "
            "correct it, or download the model and give its folder"
        ) from None
    if tokenizer.eos_token_id is None:
        raise ConfigError(
            f"policy.path must name a tokenizer with an end-of-sequence token, got {policy.path}; "
            "set eos_token in its tokenizer_config.json"
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def context_length(policy: PolicyConfig) -> int:
    """Tokens a sequence may have: the config's limit, or the model's own."""
    from transformers import AutoConfig

    if policy.max_model_len is not None:
        return policy.max_model_len
    model = AutoConfig.from_pretrained(
        storage.local_folder(policy.path), revision=policy.revision, trust_remote_code=policy.trust_remote_code
    )
    return int(model.get_text_config().max_position_embeddings)


def resolve_format(tokenizer: ChatTemplate, prompt_format: str) -> Format:
    """What "auto" means for this tokenizer.

    Raises:
        ConfigError: "chat" is asked of a tokenizer without a chat template.
    """
    if prompt_format == "chat" and not tokenizer.chat_template:
        raise ConfigError(
            'policy.prompt_format must be "plain" or "auto" for a tokenizer without a chat template, '
            'got "chat"; or add a chat_template.jinja to the model folder'
        )
    return "plain" if prompt_format == "plain" or not tokenizer.chat_template else "chat"


def render(tokenizer: ChatTemplate, prompt_format: str, messages_or_text: str | Messages) -> str:
    """What the policy reads: the text itself, or the chat template with the turn handed to the assistant.

    Raises:
        ConfigError: chat messages for a policy that reads plain text.
        DataError: the template refuses these messages (say, two user turns in a row).
    """
    from jinja2 import TemplateError

    if resolve_format(tokenizer, prompt_format) == "plain":
        if isinstance(messages_or_text, str):
            return messages_or_text
        raise ConfigError(
            "messages_column needs a chat template, and the policy reads plain text; set prompt_column "
            'instead, or policy.prompt_format = "chat" with a tokenizer that has a template'
        )
    if isinstance(messages_or_text, str):
        messages_or_text = [{"role": "user", "content": messages_or_text}]
    try:
        return tokenizer.apply_chat_template(messages_or_text, tokenize=False, add_generation_prompt=True)
    except TemplateError as error:
        shown = json.dumps(messages_or_text)[:200]
        raise DataError(f"the policy's chat template refuses these messages: {error}; got {shown}") from None


def encode_prompt(tokenizer: "PreTrainedTokenizerBase", rendered: str, prompt_format: str = "auto") -> list[int]:
    """Tokens of a rendered prompt.

    Plain text gets a BOS if the tokenizer adds one, and never an EOS. A chat template writes its own BOS.
    """
    token_ids = tokenizer.encode(rendered, add_special_tokens=False)
    if resolve_format(tokenizer, prompt_format) == "chat" or tokenizer.bos_token_id is None:
        return token_ids
    adds_bos = tokenizer.encode("a")[:1] == [tokenizer.bos_token_id]
    return [tokenizer.bos_token_id, *token_ids] if adds_bos else token_ids  # type: ignore[list-item]


def encode_response(tokenizer: "PreTrainedTokenizerBase", text: str) -> list[int]:
    """Tokens of a response that continues a prompt: no BOS, EOS at the end.

    Sentencepiece-style tokenizers put a space before the first word of whatever they encode. A continuation
    has none: the text is encoded behind an anchor, whose tokens are cut off again. Where an anchor merges
    with the text, the next one is tried.
    """
    token_ids = tokenizer.encode(text, add_special_tokens=False)
    for anchor in _ANCHORS:
        prefix = tokenizer.encode(anchor, add_special_tokens=False)
        anchored = tokenizer.encode(anchor + text, add_special_tokens=False)
        if anchored[: len(prefix)] == prefix:
            token_ids = anchored[len(prefix) :]
            break
    assert isinstance(tokenizer.eos_token_id, int)  # load_tokenizer refused it otherwise
    return [*token_ids, tokenizer.eos_token_id]
