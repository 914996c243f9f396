"""Tokenizers: the rendered text of a prompt, and the tokens of prompts and of given responses.

Prompt and response are tokenised apart: training must see exactly the prefix that generation was conditioned
on, and tokenising the two together could merge the last token of one with the first of the other.
"""

import json
import os
from typing import TYPE_CHECKING, Literal, Protocol, cast

from rayrl.config import PolicyConfig
from rayrl.data.chats import Messages
from rayrl.errors import ConfigError, DataError
from rayrl.runs import storage

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Format = Literal["plain", "chat"]

ANCHORS = ("\n", "a", ":")
"""Texts to encode a response behind; see `encode_response`."""


class ChatTemplate(Protocol):
    """The part of a tokenizer that renders chats."""

    @property
    def chat_template(self) -> object: ...

    def apply_chat_template(self, conversation: Messages, *, tokenize: bool, add_generation_prompt: bool) -> object: ...


def load_tokenizer(policy: PolicyConfig) -> "PreTrainedTokenizerBase":
    """Load the policy's tokenizer from a folder, a URL or the hub; one without a padding token pads with EOS.

    Raises:
        ConfigError: the folder holds no model, or no tokenizer, or the hub does not give it; or it has no EOS token.
    """
    # transformers takes seconds to import, and planning does without it.
    from transformers import AutoTokenizer

    path = storage.local_folder(policy.path)
    # transformers would take such a folder for a model of unknown type, and its message would not name the setting.
    if os.path.isdir(path) and not os.path.isfile(os.path.join(path, "config.json")):
        raise ConfigError(f"policy.path must be a model folder with a config.json, got {policy.path}")
    is_offline = os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            path,
            revision=policy.revision,
            trust_remote_code=policy.trust_remote_code,
            local_files_only=is_offline,
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
    """Most tokens of a sequence: the config's limit, or the model's own."""
    from transformers import AutoConfig

    if policy.max_model_len is not None:
        return policy.max_model_len
    model = AutoConfig.from_pretrained(
        storage.local_folder(policy.path), revision=policy.revision, trust_remote_code=policy.trust_remote_code
    )
    return int(model.get_text_config().max_position_embeddings)


def resolve_format(tokenizer: ChatTemplate, prompt_format: str) -> Format:
    """Choose the format that `policy.prompt_format` means for this tokenizer; "auto" is chat if it has a template.

    Raises:
        ConfigError: the format is "chat", and the tokenizer has no chat template.
    """
    if prompt_format == "chat" and not tokenizer.chat_template:
        raise ConfigError(
            'policy.prompt_format must be "plain" or "auto" for a tokenizer without a chat template, '
            'got "chat"; or add a chat_template.jinja to the model folder'
        )
    return "plain" if prompt_format == "plain" or not tokenizer.chat_template else "chat"


def render(tokenizer: ChatTemplate, prompt_format: str, messages_or_text: str | Messages) -> str:
    """Make the text that the policy reads: plain text as it is, or the chat template up to the assistant's turn.

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
        rendered = tokenizer.apply_chat_template(messages_or_text, tokenize=False, add_generation_prompt=True)
    except TemplateError as error:
        shown = json.dumps(messages_or_text)[:200]
        raise DataError(f"the policy's chat template refuses these messages: {error}; got {shown}") from None
    assert isinstance(rendered, str)  # tokenize=False
    return rendered


def encode_prompt(tokenizer: "PreTrainedTokenizerBase", rendered: str, prompt_format: str = "auto") -> list[int]:
    """Encode a rendered prompt.

    Plain text gets a BOS if the tokenizer adds one, and never an EOS. A chat template writes its own BOS.
    """
    return encode_prompts(tokenizer, [rendered], prompt_format)[0]


def encode_prompts(
    tokenizer: "PreTrainedTokenizerBase", rendered: list[str], prompt_format: str = "auto"
) -> list[list[int]]:
    """Encode at least one rendered prompt like `encode_prompt`; together they are much faster."""
    prompts = cast("list[list[int]]", tokenizer(rendered, add_special_tokens=False)["input_ids"])
    bos_id = cast("int | None", tokenizer.bos_token_id)
    if resolve_format(tokenizer, prompt_format) == "chat" or bos_id is None:
        return prompts
    # Having a BOS does not mean adding it: this depends on the tokenizer's settings, and shows at any text.
    adds_bos = tokenizer.encode("a")[:1] == [bos_id]
    return [[bos_id, *token_ids] for token_ids in prompts] if adds_bos else prompts


def encode_response(tokenizer: "PreTrainedTokenizerBase", text: str) -> list[int]:
    """Encode a response that continues a prompt: no BOS, EOS at the end.

    Sentencepiece-style tokenizers put a space before the first word of the text that they encode. A continuation
    has none: the text is encoded behind an anchor, whose tokens are cut off again. Where an anchor merges
    with the text, the next one is tried.
    """
    token_ids = tokenizer.encode(text, add_special_tokens=False)  # if the text merges with every anchor
    for anchor in ANCHORS:
        prefix = tokenizer.encode(anchor, add_special_tokens=False)
        anchored = tokenizer.encode(anchor + text, add_special_tokens=False)
        if anchored[: len(prefix)] == prefix:
            token_ids = anchored[len(prefix) :]
            break
    assert isinstance(tokenizer.eos_token_id, int)  # load_tokenizer refused it otherwise
    return [*token_ids, tokenizer.eos_token_id]
