"""Model folders with the chat templates that people have, and the quickstart's tokenizer under them."""

import json
from pathlib import Path

from rayrl.config import PolicyConfig

MODEL = Path(__file__).parents[1] / "jobs" / "quickstart" / "model"
CHATML_TOKENS = ("<|im_start|>", "<|im_end|>")

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
WITH_TOOLS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}{% if m.name is defined %} {{ m.name }}{% endif %}"
    "{{ '\n' + m.content }}"
    "{% if m.tool_calls is defined %}{% for c in m.tool_calls %}<tool_call>{{ c.function | tojson }}</tool_call>"
    "{% endfor %}{% endif %}{% if m.tool_call_id is defined %}({{ m.tool_call_id }}){% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
GEMMA = (
    "{{ bos_token }}"
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "<|im_start|>{{ m['role'] }}\n{{ m['content'] | trim }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>model\n{% endif %}"
)
TOOLS_NONE = "{% if tools is not none %}{{ tools | tojson }}{% endif %}" + CHATML
TYPE_ERROR = "{{ 'a' + 1 }}" + CHATML
BROKEN = "{% for m in messages }" + CHATML
CLOCK = "{{ strftime_now('%d %b %Y %H:%M:%S.%f') }}\n" + CHATML
BOS = "{{ bos_token }}" + CHATML


def chat_policy(folder, template=CHATML, *, tokens=CHATML_TOKENS, without=(), token_map=None):
    """Write the quickstart's tokenizer with another template and further control tokens.

    Args:
        folder: where.
        template: a template, a list of named ones, or None.
        tokens: control tokens to add.
        without: settings to leave out of tokenizer_config.json.
        token_map: content of a special_tokens_map.json.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text((MODEL / "config.json").read_text())
    (folder / "model.safetensors").symlink_to(MODEL / "model.safetensors")
    tokenizer = json.loads((MODEL / "tokenizer.json").read_text())
    size = len(tokenizer["model"]["vocab"])
    options = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    tokenizer["added_tokens"] += [{"id": size + n, "content": token, **options} for n, token in enumerate(tokens)]
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    settings = json.loads((MODEL / "tokenizer_config.json").read_text()) | {"chat_template": template}
    (folder / "tokenizer_config.json").write_text(
        json.dumps({name: value for name, value in settings.items() if name not in without})
    )
    if token_map is not None:
        (folder / "special_tokens_map.json").write_text(json.dumps(token_map))
    return PolicyConfig(path=str(folder))


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def system(text):
    return {"role": "system", "content": text}


def write_rows(path, rows):
    """Write JSON lines; returns the path as text."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)
