"""Failed calls to a judge, told apart: the judge failed, the item did, it may pass, or the outcome is unknown.

The distinction decides about money and labels. A judge's failure ends the asking, an item's failure is one abstention,
and what may pass is tried again. Status codes tell most of it; gateways put the rest into codes and words.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

from rayrl.oracles.completions import ErrorBody, Usage, read_error, read_usage
from rayrl.oracles.retries import retry_after_s

Kind = Literal["judge", "item", "passing", "unreachable", "unknown"]
LimitField = Literal["max_tokens", "max_completion_tokens"]

_MAX_WORDS = 200
"""Characters kept of the server's own words."""
_PASSING_STATUS = frozenset({409, 425, 429})
_GAVE_UP_STATUS = frozenset({408, 504, 522, 524})
"""A gateway, or the server, gave up waiting: the model may have been writing all the same, for money."""
_ITEM_STATUS = frozenset({400, 413, 422})
_STATUS_OF_CODE = {
    "invalid_api_key": 401,
    "authentication_error": 401,
    "unauthenticated": 401,
    "insufficient_quota": 402,
    "insufficient_balance": 402,
    "billing_error": 402,
    "permission_error": 403,
    "permission_denied": 403,
    "model_not_found": 404,
    "not_found_error": 404,
    "not_found": 404,
    "rate_limit_exceeded": 429,
    "rate_limit_error": 429,
    "resource_exhausted": 429,
    "invalid_request_error": 400,
    "invalid_argument": 400,
    "badrequesterror": 400,
    "context_length_exceeded": 400,
    "content_filter": 400,
    "content_policy_violation": 400,
}
"""Status of an error object's code or type, for errors that come under status 200. Any other is an error of the
server's, which may pass."""
_NO_CREDIT_CODE = re.compile(
    r"insufficient_(quota|balance|funds|credits?)|billing|payment_required|quota_exceeded_total"
)
_NO_CREDIT_WORDS = re.compile(
    r"exceeded your current quota|insufficient (?:\w+ )?(?:quota|balance|credits?|funds)|credit balance is too low"
    r"|out of credits?|no credits? (?:left|remaining)|billing (?:hard limit|is not active|not active)"
    r"|account is not active|payment required|arrears",
    re.IGNORECASE,
)
_FILTERED = re.compile(
    r"moderat|flagged|content[_ ]?(?:filter|policy|management)|responsible[_ ]?ai|data_inspection|safety", re.IGNORECASE
)
_STREAM_WANTED = re.compile(
    r"stream\w*\W{0,3}(?:\w+ ){0,3}(?:must be|should be|is required|required|only)\b|only supports? stream",
    re.IGNORECASE,
)
_NO_MODEL = re.compile(
    r"model_not_found|unknown model|invalid model|no such model|model\b.{0,80}(?:not found|not exist|does ?n.t exist)",
    re.IGNORECASE | re.DOTALL,
)
_KEY_REFUSED = re.compile(r"api_key_invalid|(?:invalid|incorrect) api.?key|api key not valid", re.IGNORECASE)
_UNSUPPORTED = re.compile(
    r"unsupported|not support|n.t support|unrecogni[sz]ed|unknown|unexpected|not permitted|not allowed|extra inputs"
    r"|extra_forbidden|only the default|invalid (?:parameter|argument|field)|deprecated",
    re.IGNORECASE,
)
_TOO_LONG = re.compile(
    r"context[_ ](?:length|window|size)|too (?:large|long)|maximum context|longer than the maximum"
    r"|exceeds? the (?:maximum|max)\b.{0,40}\btokens|tokens\b.{0,40}\bmust be <=",
    re.IGNORECASE,
)
_LIMIT_TOO_LARGE = re.compile(
    r"at most \d+ completion tokens|too large: (?P<asked>\d+)\b.*?maximum context length is (?P<room>\d+)",
    re.IGNORECASE,
)
"""The longest answer is longer than the model can write, or than all that it can hold: that is so for every item."""
_STRUCTURED = re.compile(r"response_format|json_schema|json schema|structured output|guided|grammar", re.IGNORECASE)
_TAG = re.compile(r"<(?:script|style)\b.*?</(?:script|style)>|<[^>]*>", re.IGNORECASE | re.DOTALL)
_HTML = re.compile(r"\s*<(?:!doctype html|html|head|body)\b", re.IGNORECASE)


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """An HTTP answer, as it came."""

    status: int
    headers: Mapping[str, str]
    """Names in small letters."""
    body: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Sent:
    """What was sent, as far as a refusal may be about it, and the settings that it came from."""

    prefix: str
    """Prefix of the endpoint's settings: "oracle." or "oracle.failover[0]."."""
    url: str
    model: str
    key_source: str | None
    limit_field: LimitField
    has_temperature: bool
    asks_json: bool
    extra_fields: frozenset[str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """A call that gave no answer."""

    kind: Kind
    """"judge": it fails for every question. "item": for this one. "passing": it may succeed when tried again, and so
    may "unreachable", which is the judge's failure if it lasts. "unknown": the call may have been billed."""
    reason: str
    remedy: str = ""
    is_declined: bool = False
    """The item was refused for what is in it, or for its length: the judge does its part."""
    usage: Usage | None = None
    """Tokens that a failed call used all the same, where the server told their number."""
    retry_after_s: float | None = None
    wanted_limit: LimitField | None = None
    """The name under which the server wants the longest answer, where it refused the other one."""


def failure_of(reply: Reply, sent: Sent) -> Failure | None:
    """Tell a failed call from an answer; None is an answer, or at least no error."""
    error = read_error(reply.body)
    if reply.status < 300:
        if error is None:
            return _no_chat(reply, sent)
        failure = _classify(_status_of(error), reply, error, sent)
        is_told, usage = read_usage(reply.body)
        # What was used before the call failed is billed; tried again, it would be billed twice.
        return replace(failure, kind="unknown", usage=usage, wanted_limit=None) if is_told else failure
    return _classify(reply.status, reply, error, sent)


def words(reply: Reply, error: ErrorBody | None) -> str:
    """Cut the server's own words out of an answer: short, on one line, without markup and control characters."""
    text = reply.body if error is None else error.message
    line = " ".join(_TAG.sub(" ", text).split())[:_MAX_WORDS]
    return "".join(character if character.isprintable() else "\ufffd" for character in line)


def is_html(reply: Reply) -> bool:
    """Return whether an answer is a page for a browser."""
    return "text/html" in reply.headers.get("content-type", "") or _HTML.match(reply.body) is not None


def address_remedy(sent: Sent) -> str:
    """Say what to do about an address without a chat endpoint."""
    setting = f"{sent.prefix}base_url"
    if sent.url.rstrip("/").endswith("/v1"):
        return f"correct {setting}"
    return f"is /v1 missing at the end of {setting}? Most servers want it: {sent.url.rstrip('/')}/v1"


def key_remedy(sent: Sent) -> str:
    """Say what to do about a refused key."""
    setting = f"{sent.prefix}api_key_env"
    if sent.key_source is None:
        return f"no key was sent: set {setting} to the variable, or the file:PATH, that holds one"
    return f"put a valid key where {setting} points, which is {sent.key_source!r}"


def _classify(status: int, reply: Reply, error: ErrorBody | None, sent: Sent) -> Failure:
    said = words(reply, error)
    codes = " ".join(error.codes) if error else ""
    reason = f"status {status}" + (f': "{said}"' if said else "")

    def judge(remedy: str) -> Failure:
        return Failure(kind="judge", reason=reason, remedy=remedy)

    if 300 <= status < 400:
        return judge(f"it moved to {reply.headers.get('location', 'another address')}: correct {sent.prefix}base_url")
    if status < 500 and _STREAM_WANTED.search(said):
        return judge(f"it only streams, and answers are read in one piece: use another server at {sent.prefix}base_url")
    if status == 401 or (status in (400, 403) and _KEY_REFUSED.search(f"{codes} {said}")):
        return judge(key_remedy(sent))
    if _has_no_credit(status, codes, said):
        return judge("no credit is left, or its limit is reached: pay in credit or raise the limit at the provider")
    is_filtered = error is not None and _FILTERED.search(f"{codes} {error.message} {error.details}") is not None
    if is_filtered and status in (400, 403, 422):
        return Failure(kind="item", reason=f"the judge's filter refused the item ({reason})", is_declined=True)
    if status in (400, 404, 405) and _NO_MODEL.search(f"{codes} {said}"):
        return judge(f"it does not know the model {sent.model!r}: correct oracle.model")
    if status in (404, 405):
        return judge(f"there is no chat endpoint; {address_remedy(sent)}")
    if status == 407:
        return judge("the proxy wants a user name and password: write them into HTTPS_PROXY or HTTP_PROXY")
    if status in _GAVE_UP_STATUS:
        return Failure(kind="unknown", reason=f"{reason}, which may have come while the judge was writing")
    if status in _PASSING_STATUS or status >= 500:
        return Failure(kind="passing", reason=reason, retry_after_s=retry_after_s(reply.headers, said))
    if status in _ITEM_STATUS:
        field = _refused_field(error, said, sent)
        return field or _refused_item(status, f"{codes} {said}", reason)
    if status == 403:
        return judge(f"it refuses access: {key_remedy(sent)}, or use a key that may ask for {sent.model!r} from here")
    return judge(f"correct {sent.prefix}base_url or oracle.model")


def _refused_item(status: int, about: str, reason: str) -> Failure:
    """Tell an item that is too long from one that is refused for reasons unknown."""
    limit = _LIMIT_TOO_LARGE.search(about)
    if limit and (limit["asked"] is None or int(limit["asked"]) >= int(limit["room"])):
        return Failure(kind="judge", reason=reason, remedy="lower oracle.max_tokens to what this model can write")
    if status == 413 or _TOO_LONG.search(about):
        return Failure(kind="item", reason=f"the item is too long for the judge ({reason})", is_declined=True)
    return Failure(kind="item", reason=reason)


def _has_no_credit(status: int, codes: str, said: str) -> bool:
    if status == 402:
        return True
    if status not in (400, 403, 429):
        return False
    if _NO_CREDIT_CODE.search(codes):
        return True
    # Rate limits speak of quotas too, and say when to come back.
    is_rate = "rate_limit" in codes or retry_after_s({}, said) is not None
    return not is_rate and _NO_CREDIT_WORDS.search(said) is not None


def _refused_field(error: ErrorBody | None, said: str, sent: Sent) -> Failure | None:
    """Find the setting that a server refuses in a request; None if the refusal is about the item."""
    parameter = error.parameter if error else ""
    about = f"{parameter} {' '.join(error.codes) if error else ''} {said}"
    reason = f'the request is refused: "{said}"'
    is_unsupported = _UNSUPPORTED.search(about) is not None
    if is_unsupported and not _TOO_LONG.search(said) and _names(about, sent.limit_field):
        other: LimitField = "max_completion_tokens" if sent.limit_field == "max_tokens" else "max_tokens"
        return Failure(kind="item", reason=reason, wanted_limit=other)
    is_temperature = parameter == "temperature" or (is_unsupported and _names(said, "temperature"))
    if sent.has_temperature and is_temperature:
        return Failure(kind="judge", reason=reason, remedy='set oracle.temperature = "default", which leaves it out')
    if sent.asks_json and _STRUCTURED.search(about):
        return Failure(kind="judge", reason=reason, remedy='set oracle.answer = "text"')
    for field in sorted(sent.extra_fields):
        if parameter == field or (is_unsupported and _names(said, field)):
            return Failure(kind="judge", reason=reason, remedy=f"correct oracle.extra_body.{field}, or leave it out")
    return None


def _names(text: str, field: str) -> bool:
    return re.search(rf"(?<!\w){re.escape(field)}(?!\w)", text) is not None


def _status_of(error: ErrorBody) -> int:
    """Return the status that an error object stands for, where it came under another one."""
    for code in error.codes:
        if code.isdigit() and 400 <= int(code) < 600:
            return int(code)
    for code in error.codes:
        if code in _STATUS_OF_CODE:
            return _STATUS_OF_CODE[code]
    if _NO_CREDIT_WORDS.search(error.message):
        return 402
    return 401 if _KEY_REFUSED.search(error.message) else 500


def _no_chat(reply: Reply, sent: Sent) -> Failure | None:
    """Find out whether an answer under status 200 comes from no chat endpoint at all."""
    if is_html(reply):
        reason = f'a page for browsers came instead of an answer: "{words(reply, None)}"'
        return Failure(kind="judge", reason=reason, remedy=f"there is no chat endpoint; {address_remedy(sent)}")
    if "text/event-stream" in reply.headers.get("content-type", "") or _is_stream(reply.body):
        remedy = f"answers are read in one piece: use another server at {sent.prefix}base_url"
        return Failure(kind="judge", reason="the answer came as a stream, which was not asked for", remedy=remedy)
    return None


def _is_stream(body: str) -> bool:
    if not body.lstrip().startswith("data:"):
        return False
    line = body.lstrip().partition("\n")[0].removeprefix("data:").strip()
    try:
        json.loads(line)
    except ValueError:
        return line == "[DONE]"
    return True
