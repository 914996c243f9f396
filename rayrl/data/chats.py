"""Chats in the shapes in which they are published.

Messages are {"role", "content"}, {"from", "value"} (LLaMA-Factory, ShareGPT) or {"role", "text"} (Open Assistant), and
whole chats may be dialogues in one string, "Human: ... Assistant: ..." (Anthropic's HH). All become
{"role": "system" | "user" | "assistant", "content": text}.
"""

import json
import re
from typing import Any

from rayrl.errors import DataError

Messages = list[dict[str, str]]

_ROLES = {"human": "user", "prompter": "user", "gpt": "assistant"}


def read_chat(cell: Any, where: str) -> Messages:
    """A cell with messages: a list of them, a single one, JSON of either, or a Human/Assistant dialogue.

    Raises:
        DataError: it is none of these; `where` says in which row.
    """
    if isinstance(cell, str) and cell.lstrip().startswith("Human:"):
        turns = re.split(r"\n\n(Human|Assistant):", f"\n\n{cell.lstrip()}")[1:]
        roles = {"Human": "user", "Assistant": "assistant"}
        return [
            {"role": roles[who], "content": said.strip()} for who, said in zip(turns[::2], turns[1::2], strict=True)
        ]
    return [read_message(message, where) for message in read_list(cell, where)]


def read_list(cell: Any, where: str) -> list[Any]:
    """A list, possibly written as JSON (CSV has no lists); a single object is a list of one.

    Raises:
        DataError: it is neither.
    """
    parsed = cell
    if isinstance(cell, str):
        try:
            parsed = json.loads(cell) if cell.strip() else []
        except json.JSONDecodeError:
            parsed = cell
    if isinstance(parsed, dict):
        return [parsed]
    if not isinstance(parsed, list | None):
        raise DataError(f"{where}: a list of messages was expected, got {str(cell)[:80]!r}")
    return parsed or []


def read_message(cell: Any, where: str) -> dict[str, str]:
    """One message; one without a role is the assistant's.

    Raises:
        DataError: it has no text.
    """
    names = cell if isinstance(cell, dict) else {}
    text = next((names[name] for name in ("content", "value", "text") if isinstance(names.get(name), str)), None)
    role = names.get("role") or names.get("from") or "assistant"
    if text is None or not isinstance(role, str):
        raise DataError(f'{where}: a message must be {{"role": text, "content": text}}, got {str(cell)[:80]}')
    return {"role": _ROLES.get(role, role), "content": text}


def split_reply(messages: Messages) -> tuple[Messages, str]:
    """A chat's prompt, and the assistant's message after it; "" if the chat ends without one."""
    if messages and messages[-1]["role"] == "assistant":
        return messages[:-1], messages[-1]["content"]
    return messages, ""
