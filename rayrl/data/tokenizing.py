"""Tokenizers: the rendered text of a prompt, and the tokens of prompts and of given responses.

Prompt and response are tokenised apart: training must see exactly the prefix that generation was conditioned
on, and tokenising the two together could merge the last token of one with the first of the other.

Texts are data: a control token inside a message, a response or a judge prompt is encoded as ordinary text, and only the
chat template and the end of a response write control tokens (see `rayrl.data.control_tokens`).
"""

import json
import os
from collections.abc import Callable, Mapping
from datetime import datetime
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal, Protocol, cast
from weakref import WeakKeyDictionary

from rayrl.config import PolicyConfig
from rayrl.data.chats import Messages
from rayrl.data.control_tokens import (
    NamesTokens,
    control_tokens,
    encode_behind,
    encode_marked,
    has_control_tokens,
    unmark,
)
from rayrl.data.reading import Room
from rayrl.errors import ConfigError, DataError
from rayrl.runs import storage

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Format = Literal["plain", "chat"]
TemplateValue = bool | int | float | str
"""Value of a variable of a chat template."""

TEMPLATE_TIME = datetime(2024, 7, 26)
"""Time that a chat template is told when it asks for the time: the date that Llama's templates fall back to. With the
real one, the same prompt would have another id every day."""
_ANSWER = "Answer"
"""Stands for a response, to see what a chat template writes behind it."""
_ends: "WeakKeyDictionary[object, dict[str, int]]" = WeakKeyDictionary()
# A template is a program of the model's makers: it raises what programs raise.
TEMPLATE_ERRORS = (TypeError, ValueError, LookupError, AttributeError, ArithmeticError)


class ChatTemplate(NamesTokens, Protocol):
    """The part of a tokenizer that renders chats."""

    @property
    def chat_template(self) -> object: ...

    def apply_chat_template(
        self,
        conversation: Messages,
        *,
        tokenize: bool,
        add_generation_prompt: bool,
        strftime_now: Callable[[str], str],
        **template_kwargs: Any,
    ) -> object: ...


def load_tokenizer(policy: PolicyConfig) -> "PreTrainedTokenizerBase":
    """Load the policy's tokenizer from a folder, a URL or the hub.

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


SENTENCE_CONFIGS = tuple(
    f"sentence_{kind}_config.json"
    for kind in ("bert", "roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet")
)
"""Files in which a sentence-embedding model says how long a text it was made for, which vLLM takes as its context."""


def embedding_context_length(path: str) -> int:
    """Most tokens that a sentence-embedding model reads: its own limit, where it has one below its architecture's."""
    from transformers.utils.hub import cached_file

    longest = context_length(PolicyConfig(path=path))
    for name in SENTENCE_CONFIGS:
        file = cached_file(storage.local_folder(path), name, _raise_exceptions_for_missing_entries=False)
        if file is not None:
            limit = json.loads(Path(file).read_text()).get("max_seq_length")
            return longest if limit is None else min(longest, int(limit))
    return longest


def room_of(tokenizer: "PreTrainedTokenizerBase", policy: PolicyConfig) -> Room:
    """Return the policy's context, and how its prompts are counted."""
    return Room(
        num_tokens=context_length(policy),
        count_tokens=lambda rendered: len(encode_prompt(tokenizer, rendered, policy.prompt_format)),
    )


def resolve_format(tokenizer: ChatTemplate, prompt_format: str) -> Format:
    """Choose the format that `policy.prompt_format` means for this tokenizer; "auto" is chat if it has a template.

    Raises:
        ConfigError: the format is not "plain", and the tokenizer has several chat templates without a default; or it
            is "chat", and the tokenizer has none.
    """
    template = tokenizer.chat_template
    if prompt_format == "plain":
        return "plain"
    if isinstance(template, Mapping) and "default" not in template:
        names = ", ".join(cast("Mapping[str, str]", template)) or "no name"
        raise ConfigError(
            f'policy.path: of several chat templates one must be named "default", got {names}; '
            'name one so in the tokenizer_config.json, or set policy.prompt_format = "plain"'
        )
    if prompt_format == "chat" and not template:
        raise ConfigError(
            'policy.prompt_format must be "plain" or "auto" for a tokenizer without a chat template, '
            'got "chat"; or add a chat_template.jinja to the model folder'
        )
    return "chat" if template else "plain"


def render(
    tokenizer: ChatTemplate,
    prompt_format: str,
    messages_or_text: str | Messages,
    *,
    template_kwargs: Mapping[str, TemplateValue] = MappingProxyType({}),
) -> str:
    """Make the text that the policy reads: plain text as it is, or the chat template up to the assistant's turn.

    Each control token inside the text or the messages is marked, so that `encode_prompts` tells it from the template's.

    Args:
        tokenizer: has the template.
        prompt_format: "auto", "plain" or "chat", see `resolve_format`.
        messages_or_text: a chat, or the user's only message.
        template_kwargs: variables that the template reads, `policy.chat_template_kwargs`.

    Raises:
        ConfigError: chat messages for a policy that reads plain text, a chat template that is no valid Jinja, or one
            that does not read one of the variables.
        DataError: the template refuses these messages (say, two user turns in a row).
    """
    from jinja2 import TemplateError, TemplateSyntaxError

    marked = control_tokens(tokenizer).mark_all(messages_or_text)
    if resolve_format(tokenizer, prompt_format) == "plain":
        if isinstance(marked, str):
            return marked
        raise ConfigError(
            "messages_column needs a chat template, and the policy reads plain text; set prompt_column "
            'instead, or policy.prompt_format = "chat" with a tokenizer that has a template'
        )
    messages: Messages = [{"role": "user", "content": marked}] if isinstance(marked, str) else marked
    for name in template_kwargs:
        # Of several templates the text of all is searched: a variable of any of them is no misspelling.
        if name not in str(tokenizer.chat_template):
            raise ConfigError(
                f"policy.chat_template_kwargs must name variables that the chat template reads, got {name}, which it "
                "does not; correct the name, or leave it out"
            )
    try:
        rendered = tokenizer.apply_chat_template(
            messages,
            tokenize=False,
            add_generation_prompt=True,
            strftime_now=TEMPLATE_TIME.strftime,
            **template_kwargs,
        )
    except TemplateSyntaxError as error:
        raise ConfigError(
            f"policy.path: the tokenizer's chat template must be valid Jinja, and its line {error.lineno} is not: "
            f'{error}; correct the model folder\'s template, or set policy.prompt_format = "plain"'
        ) from None
    except (TemplateError, *TEMPLATE_ERRORS) as error:
        shown = unmark(json.dumps(messages, ensure_ascii=False, default=str))[:200]
        raise DataError(
            f"the policy's chat template refuses these messages: {error}; got {shown}. Change or remove the row: many "
            "templates take no system message, or no two turns of the same role one after the other"
        ) from None
    assert isinstance(rendered, str)  # tokenize=False
    return rendered


def renderer_of(tokenizer: ChatTemplate, policy: PolicyConfig) -> Callable[[str | Messages], str]:
    """Return `render` with the policy's settings."""
    return partial(render, tokenizer, policy.prompt_format, template_kwargs=policy.chat_template_kwargs)


def encode_prompt(tokenizer: "PreTrainedTokenizerBase", rendered: str, prompt_format: str = "auto") -> list[int]:
    """Encode a rendered prompt.

    Plain text gets a BOS if the tokenizer adds one, and never an EOS. A chat template writes its own BOS.
    """
    return encode_prompts(tokenizer, [rendered], prompt_format)[0]


def encode_prompts(
    tokenizer: "PreTrainedTokenizerBase", rendered: list[str], prompt_format: str = "auto"
) -> list[list[int]]:
    """Encode at least one rendered prompt like `encode_prompt`; together they are much faster.

    Marked control tokens are encoded as ordinary text, and in plain text those without a mark too.
    """
    is_chat = resolve_format(tokenizer, prompt_format) == "chat"
    prompts = _encode_all(tokenizer, rendered if is_chat else control_tokens(tokenizer).mark_all(rendered))
    bos_id = cast("int | None", tokenizer.bos_token_id)
    if is_chat or bos_id is None:
        return prompts
    # Having a BOS does not mean adding it: this depends on the tokenizer's settings, and shows at any text.
    adds_bos = tokenizer.encode("a")[:1] == [bos_id]
    return [[bos_id, *token_ids] for token_ids in prompts] if adds_bos else prompts


def encode_response(tokenizer: "PreTrainedTokenizerBase", text: str, prompt_format: str = "auto") -> list[int]:
    """Encode a response that continues a prompt: no BOS, the end of the turn at the end and nowhere else."""
    control = control_tokens(tokenizer)
    marked = control.mark(text)

    def encode(piece: str, is_text: bool) -> list[int]:
        return _encode(tokenizer, piece, is_text=is_text)

    if has_control_tokens(marked):
        token_ids = encode_marked(encode, control, marked, continues=True)
    else:
        token_ids = encode_behind(encode, control, text)
    return [*token_ids, end_of_turn(tokenizer, prompt_format)]


def end_of_turn(tokenizer: "PreTrainedTokenizerBase", prompt_format: str = "auto") -> int:
    """Return the token that ends a response: that of the chat template, or else the end of the sequence.

    Many tokenizers of base models have a template whose turns end in <|im_end|>, and <|endoftext|> as the end of the
    sequence: a policy that learnt the latter would close no turn as the template writes the turns before it.
    """
    ends = _ends.setdefault(tokenizer, {})
    if prompt_format not in ends:
        ends[prompt_format] = _find_end_of_turn(tokenizer, prompt_format)
    return ends[prompt_format]


def _find_end_of_turn(tokenizer: "PreTrainedTokenizerBase", prompt_format: str) -> int:
    from jinja2 import TemplateError

    end_of_sequence = tokenizer.eos_token_id
    assert isinstance(end_of_sequence, int)  # load_tokenizer refused it otherwise
    if resolve_format(tokenizer, prompt_format) == "plain":
        return end_of_sequence
    chat: Messages = [{"role": "user", "content": "Question"}, {"role": "assistant", "content": _ANSWER}]
    try:
        rendered = cast("ChatTemplate", tokenizer).apply_chat_template(
            chat, tokenize=False, add_generation_prompt=False, strftime_now=TEMPLATE_TIME.strftime
        )
    except (TemplateError, *TEMPLATE_ERRORS):  # `render` names the fault when it is asked for a prompt
        return end_of_sequence
    _, found, behind = str(rendered).rpartition(_ANSWER)
    if not found:
        return end_of_sequence
    end = control_tokens(tokenizer).first(behind.strip())
    return end_of_sequence if end is None else end


def encode_text(tokenizer: "PreTrainedTokenizerBase", text: str) -> list[int]:
    """Encode a text for a sentence-embedding model: with the special tokens that the tokenizer adds, and no others."""
    return tokenizer.encode(as_ordinary_text(tokenizer, text), split_special_tokens=True)


def as_ordinary_text(tokenizer: "PreTrainedTokenizerBase", text: str) -> str:
    """Return a text that holds no control token once it is encoded with `split_special_tokens`.

    That option is enough for most tokenizers, and the text stays as it is. A vocabulary that lists a control token
    among its words as well reads it all the same: there it gets a space behind its first character.
    """
    control = control_tokens(tokenizer)

    def spell(token: str) -> str:
        is_word = not control.ids.isdisjoint(_encode(tokenizer, token, is_text=True))
        return f"{token[0]} {token[1:]}" if is_word else token

    return control.replace(text, spell)


def _encode_all(tokenizer: "PreTrainedTokenizerBase", marked: list[str]) -> list[list[int]]:
    """Encode texts in which some control tokens are marked, the many without any in one call."""
    encoded = cast(
        "list[list[int]]", tokenizer([unmark(text) for text in marked], add_special_tokens=False)["input_ids"]
    )

    def encode(piece: str, is_text: bool) -> list[int]:
        return _encode(tokenizer, piece, is_text=is_text)

    for number, text in enumerate(marked):
        if has_control_tokens(text):
            encoded[number] = encode_marked(encode, control_tokens(tokenizer), text)
    return encoded


def _encode(tokenizer: "PreTrainedTokenizerBase", text: str, *, is_text: bool) -> list[int]:
    """Encode one text without BOS and EOS; its control tokens are ordinary text if `is_text`."""
    encoded = tokenizer(text, add_special_tokens=False, split_special_tokens=is_text)
    return cast("list[int]", encoded["input_ids"])
