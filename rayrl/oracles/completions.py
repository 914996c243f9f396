"""Chat completions and error objects, read leniently: compatible servers differ in all but the main fields."""

import json
from dataclasses import dataclass
from typing import cast

_REASONING_FIELDS = ("reasoning_content", "reasoning", "reasoning_details", "thinking")
_REASONING_PARTS = frozenset({"thinking", "reasoning"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """Tokens that the server counted."""

    input_tokens: int
    output_tokens: int
    """Thoughts included, wherever the server counts them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """An answer of the judge."""

    text: str
    """"" if there is none."""
    finish: str
    """Why it ended, in small letters; "" if that was not told."""
    refusal: str
    """The judge's own words, where it refused to answer; else ""."""
    has_choice: bool
    has_reasoning: bool
    """Whether thoughts came beside the text."""
    has_tool_call: bool
    usage: Usage | None
    """None: the server gave no count, or only a part of it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ErrorBody:
    """The error that a body tells of."""

    message: str
    codes: tuple[str, ...]
    """Its code, type and status, in small letters, as far as they are given."""
    parameter: str
    """The field of the request that it is about; "" if it names none."""
    details: str
    """All that stands beside the message."""


def read_completion(body: str) -> Completion | None:
    """Read a chat completion; None if it is something else. One without choices is a completion."""
    fields = _fields(_json(body))
    if "choices" not in fields:
        return None
    choices = _list(fields["choices"])
    choice = _fields(choices[0]) if choices else {}
    message = _fields(choice.get("message"))
    text, has_thinking_part = _text(message.get("content"))
    return Completion(
        text=text,
        finish=_string(choice.get("finish_reason")).lower(),
        refusal=_string(message.get("refusal")).strip(),
        has_choice=bool(choices),
        has_reasoning=has_thinking_part or any(message.get(field) for field in _REASONING_FIELDS),
        has_tool_call=bool(message.get("tool_calls") or message.get("function_call")),
        usage=_usage(_fields(fields.get("usage")), has_text=bool(text.strip())),
    )


def read_error(body: str) -> ErrorBody | None:
    """Read the error object of a body; None if it tells of no error. Also one inside of a choice, as gateways give."""
    parsed = _json(body)
    if isinstance(parsed, list):  # Google's endpoint wraps its errors in a list
        items = _list(cast("object", parsed))
        parsed = items[0] if items else None
    fields = _fields(parsed)
    choices = _list(fields.get("choices"))
    if choices:
        choice = _fields(choices[0])
        if _string(choice.get("finish_reason")).lower() != "error" and not choice.get("error"):
            return None
        return _error(choice.get("error") or "the server broke off with finish_reason error")
    if error := fields.get("error"):
        return _error(error)
    # FastAPI's errors are {"detail": text or list}, others are {"message": text, "code": ...}.
    if detail := fields.get("detail"):
        return _error(detail)
    return _error(fields) if isinstance(fields.get("message"), str) and "choices" not in fields else None


def read_usage(body: str) -> tuple[bool, Usage | None]:
    """Read whether a body tells of tokens that were used, and how many; None if that is not told completely."""
    fields = _fields(_fields(_json(body)).get("usage"))
    is_told = any(isinstance(value, int | float) and value is not True and value > 0 for value in fields.values())
    return is_told, _usage(fields, has_text=False)


def well_formed(text: str) -> str:
    """Replace halves of a character, which neither a request nor a table can hold, by U+FFFD."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _error(value: object) -> ErrorBody:
    if isinstance(value, list):
        items = [_fields(item) for item in _list(cast("object", value))]
        message = "; ".join(filter(None, (_string(item.get("msg")) for item in items))) or json.dumps(value)
        places = [str(place) for item in items for place in _list(item.get("loc")) if place != "body"]
        return ErrorBody(message=message, codes=(), parameter=places[0] if places else "", details="")
    fields = _fields(value)
    if not fields:
        return ErrorBody(message=str(value), codes=(), parameter="", details="")
    message = _string(fields.get("message")) or _string(fields.get("detail")) or json.dumps(fields)
    codes = tuple(
        str(code).lower() for name in ("code", "type", "status") if isinstance(code := fields.get(name), str | int)
    )
    details = {name: value for name, value in fields.items() if name not in ("message", "code", "type", "param")}
    return ErrorBody(
        message=message,
        codes=codes,
        parameter=_string(fields.get("param")),
        details=json.dumps(details) if details else "",
    )


def _usage(fields: dict[str, object], *, has_text: bool) -> Usage | None:
    num_input = _count(fields, "prompt_tokens", "input_tokens")
    num_output = _count(fields, "completion_tokens", "output_tokens")
    if num_input is None or num_output is None:
        return None
    # A server that does not count gives zeros.
    if num_input == 0 or (has_text and num_output == 0):
        return None
    # Some servers count thoughts in the total alone, and bill them.
    num_total = _count(fields, "total_tokens") or 0
    return Usage(input_tokens=num_input, output_tokens=max(num_output, num_total - num_input))


def _count(fields: dict[str, object], *names: str) -> int | None:
    for name in names:
        value = fields.get(name)
        if isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < 1e12:
            return int(value)
    return None


def _text(content: object) -> tuple[str, bool]:
    """Return the text of a message, which may come in parts, and whether a part of it is thoughts."""
    if isinstance(content, str):
        return content, False
    pieces: list[str] = []
    has_reasoning = False
    for part in _list(content):
        fields = _fields(part)
        if isinstance(part, str):
            pieces.append(part)
        elif _string(fields.get("type")) in _REASONING_PARTS:
            has_reasoning = True
        else:
            text = fields.get("text")
            pieces.append(_string(text) or _string(_fields(text).get("value")))
    return "".join(pieces), has_reasoning


def _json(body: str) -> object:
    try:
        return cast("object", json.loads(body.lstrip("\ufeff")))
    except (ValueError, RecursionError):
        return None


def _fields(value: object) -> dict[str, object]:
    """Return an object's fields; none of any other value."""
    return cast("dict[str, object]", value) if isinstance(value, dict) else {}


def _list(value: object) -> list[object]:
    return cast("list[object]", value) if isinstance(value, list) else []


def _string(value: object) -> str:
    return value if isinstance(value, str) else ""
