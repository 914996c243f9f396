"""Chats in the shapes in which they are published, read into one.

Messages are {"role", "content"}, {"from", "value"} (LLaMA-Factory, ShareGPT) or {"role", "text"} (Open Assistant), and
whole chats may be dialogues in one string, "Human: ... Assistant: ..." (Anthropic's HH). All become
{"role": "system" | "user" | "assistant", "content": text}.
"""

import json
import re
from typing import cast

from rayrl.data.rows import SHOWN_CHARACTERS
from rayrl.errors import DataError

Messages = list[dict[str, str]]

ROLES = {"human": "user", "prompter": "user", "gpt": "assistant"}
"""Published names of roles; a role that is not listed keeps its name."""
SPEAKERS = {"Human": "user", "Assistant": "assistant"}
"""Roles of the speakers of a dialogue in one string."""


def read_chat(cell: object, where: str) -> Messages:
    """Read a cell with messages: a list of them, a single one, JSON of either, or a Human/Assistant dialogue.

    Raises:
        DataError: it is none of these; `where` names the row.
    """
    if isinstance(cell, str) and cell.lstrip().startswith("Human:"):
        return _read_dialogue(cell)
    return [read_message(message, where) for message in read_list(cell, where)]


def _read_dialogue(dialogue: str) -> Messages:
    # A turn begins after a blank line, as all but the first do; elsewhere "Human:" is text. The split gives "" and then
    # speaker, text, speaker, text, ...
    _, *turns = re.split(r"\n\n(Human|Assistant):", f"\n\n{dialogue.lstrip()}")
    messages: Messages = []
    for speaker, text in zip(turns[::2], turns[1::2], strict=True):
        messages.append({"role": SPEAKERS[speaker], "content": text.strip()})
    return messages


def read_list(cell: object, where: str) -> list[object]:
    """Read a list, possibly written as JSON (CSV has no lists); a single object is a list of one.

    Raises:
        DataError: it is neither.
    """
    parsed = cell
    if isinstance(cell, str):
        try:
            parsed = json.loads(cell) if cell.strip() else []
        except json.JSONDecodeError:
            parsed = cell  # refused below, as any other text
    if parsed is None:
        return []
    if isinstance(parsed, dict):
        return [cast("object", parsed)]
    if isinstance(parsed, list):
        return cast("list[object]", parsed)
    raise DataError(f"{where}: a list of messages was expected, got {str(cell)[:SHOWN_CHARACTERS]!r}")


def read_message(cell: object, where: str) -> dict[str, str]:
    """Read one message; one without a role is the assistant's.

    Raises:
        DataError: it has no text.
    """
    message = cast("dict[str, object]", cell) if isinstance(cell, dict) else {}
    texts = [message.get(name) for name in ("content", "value", "text")]
    text = next((text for text in texts if isinstance(text, str)), None)
    role = message.get("role") or message.get("from") or "assistant"
    if text is None or not isinstance(role, str):
        shown = str(cell)[:SHOWN_CHARACTERS]
        raise DataError(f'{where}: a message must be {{"role": text, "content": text}}, got {shown}')
    return {"role": ROLES.get(role, role), "content": text}


def split_reply(messages: Messages) -> tuple[Messages, str]:
    """Split a chat into its prompt and the assistant's message after it; "" if the chat ends without one."""
    if messages and messages[-1]["role"] == "assistant":
        return messages[:-1], messages[-1]["content"]
    return messages, ""
