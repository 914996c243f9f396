"""Chats in the shapes in which they are published, read into one, and written as plain text.

Messages are {"role", "content"}, {"from", "value"} (LLaMA-Factory, ShareGPT) or {"role", "text"} (Open Assistant), and
whole chats may be dialogues in one string, "Human: ... Assistant: ..." (Anthropic's HH) or "### Human: ... ###
Assistant: ..." (Guanaco). All become
{"role": "system" | "user" | "assistant" | "tool", "content": text}, an assistant's with "tool_calls" where it calls
tools, a tool's with "name" and "tool_call_id" where they are known. A chat template reads those; judges, evaluators and
people read the text that `conversation_text` writes.
"""

import json
import re
from typing import Any, cast

from rayrl.data.cells import SHOWN_CHARACTERS
from rayrl.errors import DataError

Message = dict[str, Any]
"""A message as chat templates read it; transformers types its values as text, tool calls notwithstanding."""
Messages = list[Message]

ROLES = {
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("user", "human", "prompter"), "user"),
    **dict.fromkeys(("assistant", "gpt", "model", "ai", "bot", "chatbot"), "assistant"),
    **dict.fromkeys(("chatgpt", "gpt4", "gpt-4", "bing", "bard", "gemini", "claude", "copilot"), "assistant"),
    **dict.fromkeys(("tool", "function", "observation", "observations", "ipython"), "tool"),
}
"""Published names of roles, in lower case, and the four that chat templates know."""
CALL_ROLES = ("function_call", "tool_call")
"""Published roles of a message whose content is an assistant's tool call, as JSON."""
CONTENT_NAMES = ("content", "value", "text")
"""Published names of a message's text."""
REPLY_NAMES = ("response", "answer", "completion")
"""Published names of a reply's text, where replies stand apart from their prompt (UltraFeedback, Nectar)."""
SPEAKERS = {"Human": "user", "Assistant": "assistant"}
"""Roles of the speakers of a dialogue in one string."""
LABELS = {"system": "System", "user": "User", "assistant": "Assistant", "tool": "Tool"}
"""Labels of the turns in `conversation_text`."""

_INDENT = "  "
# All that a reader may take for the end of a line, as in `str.splitlines`.
_LINE_BREAK = re.compile("\r\n|[\n\r\v\f\x1c-\x1e\x85\u2028\u2029]")
_BEGINS_LIKE_A_TURN = re.compile(
    rf"(?:{'|'.join(LABELS.values())})(?: \(.*\))?(?: \[.*\])?:|{LABELS['assistant']} calls "
)
_DIALOGUE = re.compile(r"\s*(?:###\s*)?Human:")
_TURN = re.compile(r"\r?\n\r?\n(Human|Assistant):")
_UNPARTED_ANSWER = re.compile(r"^Assistant:", re.MULTILINE)
_HASHED_TURN = re.compile(r"\s*###\s*(Human|Assistant):")
_PYTHON_MESSAGES = re.compile(r"\s*\[?\s*\{\s*'")
_BEGINS_LIKE_MESSAGES = re.compile(r"""\s*\[?\s*\{\s*["'](?:role|from|content|value|text)["']\s*:""")
_KNOWN_ROLE = re.compile(
    rf"""["'](?:role|from)["']\s*:\s*["'](?:{"|".join(map(re.escape, (*ROLES, *CALL_ROLES)))})["']""", re.IGNORECASE
)


def read_chat(cell: object, where: str, *, default_role: str | None = None) -> Messages:
    """Read a cell with messages: a list of them, a single one, JSON of either, or a Human/Assistant dialogue.

    Args:
        cell: the cell.
        where: names the row.
        default_role: the role of a message without one; None refuses it.

    Raises:
        DataError: it is none of these, or a message is malformed.
    """
    if isinstance(cell, str):
        if is_dialogue(cell):
            return _read_dialogue(cell, where)
        if not cell.lstrip().startswith(("[", "{")) and cell.strip():
            raise DataError(
                f"{where}: a list of messages was expected, got {cell[:SHOWN_CHARACTERS]!r}; a column of plain texts "
                "belongs into prompt_column"
            )
    return [read_message(message, where, default_role=default_role) for message in read_list(cell, where)]


def is_dialogue(text: str) -> bool:
    """Return whether a text is a dialogue in one string."""
    return _DIALOGUE.match(text) is not None


def is_chat(text: str) -> bool:
    """Return whether a text is a chat: a dialogue with a turn of the assistant, or messages with their roles, as JSON
    or as Python's repr, which `read_chat` refuses.
    """
    if is_dialogue(text):
        return "Assistant:" in text
    # An object without a known role may be what a text is about.
    return _BEGINS_LIKE_MESSAGES.match(text) is not None and _KNOWN_ROLE.search(text) is not None


def read_reply(cell: object, where: str) -> str:
    """Read the text of a reply: a text as it is, or the last assistant message of a chat, which need not name its role.

    Raises:
        DataError: it is neither, or a chat without an assistant message.
    """
    if cell is None or (isinstance(cell, str) and not is_chat(cell)):
        return cell or ""
    chat = read_chat(cell, where, default_role="assistant")
    if not chat:
        return ""
    texts = [content_of(message) for message in chat if message["role"] == "assistant"]
    if not texts:
        shown = str(cell)[:SHOWN_CHARACTERS]
        raise DataError(f"{where}: an assistant message is needed, got {shown}; add one, or remove the row")
    return texts[-1]


def _read_dialogue(dialogue: str, where: str) -> Messages:
    # A turn begins after a blank line, as all but the first do, or at its hashes; elsewhere "Human:" is text. The split
    # gives "" and then speaker, text, speaker, text, ...
    turn = _HASHED_TURN if dialogue.lstrip().startswith("#") else _TURN
    _, *turns = turn.split(f"\n\n{dialogue.lstrip()}")
    messages: Messages = []
    for speaker, text in zip(turns[::2], turns[1::2], strict=True):
        messages.append({"role": SPEAKERS[speaker], "content": text.strip()})
    # Inside a chat, a line of the user may begin so; at its end it is the answer, which must not stay in the prompt.
    if messages[-1]["role"] == "user" and _UNPARTED_ANSWER.search(content_of(messages[-1])):
        raise DataError(
            f"{where}: each turn of a dialogue must begin after a blank line, and its last Assistant: does not, got "
            f"{dialogue[-SHOWN_CHARACTERS:]!r}; put a blank line before each speaker"
        )
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
        except (ValueError, RecursionError):  # no JSON, a number of too many digits, or too many levels
            parsed = cell  # refused below, as any other text
    if parsed is None:
        return []
    if isinstance(parsed, dict):
        return _transposed(cast("dict[str, object]", parsed))
    if isinstance(parsed, list):
        return cast("list[object]", parsed)
    shown = str(cell)[:SHOWN_CHARACTERS]
    if isinstance(cell, str) and _PYTHON_MESSAGES.match(cell):
        raise DataError(
            f"{where}: a list of messages must be JSON, and this looks like Python's repr of a list, got {shown!r}; "
            "write the column with json.dumps"
        )
    raise DataError(f"{where}: a list of messages was expected, got {shown!r}")


def _transposed(fields: dict[str, object]) -> list[object]:
    """Return the objects of a list that is written by fields, as `datasets` writes it; any other object alone."""
    columns = [cast("list[object]", column) for column in fields.values() if isinstance(column, list)]
    names = (*CONTENT_NAMES, *REPLY_NAMES)
    has_texts = any(
        name in names and isinstance(column, list) and all(isinstance(each, str | None) for each in column)
        for name, column in fields.items()
    )
    # A message may have parts of content, or tool calls, that are lists: not both of texts and of one length.
    is_by_fields = 1 < len(columns) == len(fields) and len(set(map(len, columns))) == 1
    if not is_by_fields or not has_texts:
        return [fields]
    return [dict(zip(fields, cells, strict=True)) for cells in zip(*columns, strict=True)]


def read_message(cell: object, where: str, *, default_role: str | None = None) -> Message:
    """Read one message.

    Args:
        cell: the message.
        where: names the row.
        default_role: the role of a message without one; None refuses it.

    Raises:
        DataError: it has no text and calls no tool, or no role, or one that is not known.
    """
    shown = str(cell)[:SHOWN_CHARACTERS]
    if not isinstance(cell, dict):
        raise DataError(f'{where}: a message must be {{"role": text, "content": text}}, got {shown}')
    message = cast("Message", cell)
    role = _read_role(message, where, shown, default_role)
    calls = _read_tool_calls(message, where)
    names = CONTENT_NAMES if default_role is None else (*CONTENT_NAMES, *REPLY_NAMES)
    text = next((text for name in names if (text := message.get(name)) is not None), None)
    if text is None and calls:
        text = ""
    if isinstance(text, list):
        text = "".join(_text_of_part(part, where) for part in cast("list[object]", text))
    if not isinstance(text, str):
        raise DataError(f'{where}: a message must be {{"role": text, "content": text}}, got {shown}')
    if role in CALL_ROLES:
        return {"role": "assistant", "content": "", "tool_calls": _parse_calls(text, where)}
    read: Message = {"role": ROLES[role], "content": text}
    if calls:
        read["tool_calls"] = calls
    for name in ("name", "tool_call_id"):
        if isinstance(message.get(name), str):
            read[name] = message[name]
    return read


def _read_role(message: Message, where: str, shown: str, default_role: str | None) -> str:
    """Return a role in lower case that is in ROLES or CALL_ROLES."""
    role = message.get("role") or message.get("from") or default_role
    if role is None:
        raise DataError(f"{where}: a message must have a role, got {shown}; give it the column role (or from)")
    name = role.strip().lower() if isinstance(role, str) else ""
    if name not in ROLES and name not in CALL_ROLES:
        known = ", ".join((*ROLES, *CALL_ROLES))
        raise DataError(f"{where}: the role of a message must be one of {known} (in any case), got {role!r}; rename it")
    return name


def _text_of_part(part: object, where: str) -> str:
    """Read one part of a content that is a list."""
    if isinstance(part, str):
        return part
    fields = cast("Message", part) if isinstance(part, dict) else {}
    text = fields.get("text")
    if fields.get("type", "text") not in ("text", "input_text", "output_text") or not isinstance(text, str):
        raise DataError(
            f'{where}: the parts of a message\'s content must be {{"type": "text", "text": text}}, got '
            f"{str(part)[:SHOWN_CHARACTERS]}; only text is read, so remove other parts or the row"
        )
    return text


def _read_tool_calls(message: Message, where: str) -> list[object]:
    """Read the tool calls of a message in the shape that chat templates read; [] without any."""
    calls = message.get("tool_calls") or []
    legacy = message.get("function_call")
    if not calls and legacy:
        calls = [legacy]
    if not isinstance(calls, list):
        raise DataError(f"{where}: tool_calls must be a list, got {str(calls)[:SHOWN_CHARACTERS]}")
    return [_read_tool_call(call, where) for call in cast("list[object]", calls)]


def _parse_calls(text: str, where: str) -> list[object]:
    """Read the content of a message in one of CALL_ROLES."""
    try:
        parsed = json.loads(text)
    except (ValueError, RecursionError):
        parsed = text  # refused by its reader
    calls = cast("list[object]", parsed) if isinstance(parsed, list) else [parsed]
    return [_read_tool_call(call, where) for call in calls]


def _read_tool_call(call: object, where: str) -> Message:
    """Read {"function": {"name", "arguments"}} or {"name", "arguments"}; arguments may be JSON."""
    fields = cast("Message", call) if isinstance(call, dict) else {}
    inner = fields.get("function")
    function = cast("Message", inner) if isinstance(inner, dict) else fields
    name, arguments = function.get("name"), function.get("arguments")
    if not isinstance(name, str) or not name:
        raise DataError(
            f'{where}: a tool call must be {{"name": text, "arguments": {{...}}}}, possibly as "function", got '
            f"{str(call)[:SHOWN_CHARACTERS]}"
        )
    if isinstance(arguments, str):
        # Chat templates write the arguments as JSON: an object that is JSON already would be quoted once more.
        try:
            parsed = json.loads(arguments)
        except (ValueError, RecursionError):
            parsed = None
        arguments = cast("object", parsed) if isinstance(parsed, dict) else arguments
    read: Message = {
        "type": "function",
        "function": {"name": name, "arguments": {} if arguments is None else arguments},
    }
    if isinstance(fields.get("id"), str):
        read["id"] = fields["id"]
    return read


def content_of(message: Message) -> str:
    """Return the text of a message that was read here."""
    return cast("str", message["content"])


def split_reply(messages: Messages) -> tuple[Messages, str]:
    """Split a chat into its prompt and the assistant's turn after it; "" if the chat ends without one.

    Several messages of the assistant at the end are one turn, and a blank line joins them. A turn that calls a tool is
    no text that a policy could be trained on, or judged for: it is cut off, and the reply is "".
    """
    end = len(messages)
    while end and messages[end - 1]["role"] == "assistant":
        end -= 1
    turn = messages[end:]
    if any("tool_calls" in message for message in turn):
        return messages[:end], ""
    return messages[:end], "\n\n".join(filter(None, map(content_of, turn)))


def split_turns(messages: Messages) -> list[tuple[Messages, str]]:
    """Split a chat at each turn of the assistant, in order, as `split_reply` does at the last one."""
    ends = [
        end
        for end, message in enumerate(messages, 1)
        if message["role"] == "assistant" and (end == len(messages) or messages[end]["role"] != "assistant")
    ]
    return [split_reply(messages[:end]) for end in ends]


def conversation_text(messages: Messages) -> str:
    """Write a chat as plain text: the whole conversation, for judges, evaluators and people.

    A single message of the user is that message. Any other chat is a transcript of turns, each with its label:

        System: Answer in French.

        User: What is a fjord?
          I have never seen one.

        Assistant calls look_up [1]: {"word": "fjord"}

        Tool (look_up) [1]: a sea inlet

    Only turns begin at the beginning of a line: the lines of a message after its first are indented, so that no text
    inside a message reads as another turn. An empty system message is left out.
    """
    messages = [each for each in messages if each["role"] != "system" or content_of(each).strip()]
    if len(messages) == 1 and messages[0]["role"] == "user":
        return lone_text(content_of(messages[0]))
    tool_names: dict[object, object] = {}
    turns: list[str] = []
    for message in messages:
        role, text = cast("str", message["role"]), content_of(message)
        calls = cast("list[Message]", message.get("tool_calls", []))
        call_id = message.get("tool_call_id")
        name = message.get("name") or (tool_names.get(call_id) if call_id else None)
        if text or not calls:
            speaker = f"{LABELS[role]} ({name})" if name else LABELS[role]
            turns.append(_turn(speaker, call_id, text))
        for call in calls:
            function = cast("Message", call["function"])
            tool_names[call.get("id")] = function["name"]
            arguments = function["arguments"]
            shown = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False, default=str)
            turns.append(_turn(f"{LABELS[role]} calls {function['name']}", call.get("id"), shown))
    return "\n\n".join(turns)


def lone_text(text: str) -> str:
    """Return the text of a user's only message as it is; one that begins like a transcript gets its own label."""
    return _turn(LABELS["user"], None, text) if _BEGINS_LIKE_A_TURN.match(text) else text


def _turn(speaker: str, call_id: object, text: str) -> str:
    """Write one turn; `call_id` is the number or id of a tool call, if it has one."""
    label = f"{speaker} [{call_id}]" if call_id else speaker
    return _LINE_BREAK.sub(lambda line_break: line_break[0] + _INDENT, f"{label}: {text}")
