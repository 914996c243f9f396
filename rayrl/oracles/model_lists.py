"""List of a server's models, by which a judge is checked for free before a run."""

import difflib
import fnmatch
import json
from typing import cast
from urllib.parse import urlsplit

from rayrl.oracles.completions import read_error
from rayrl.oracles.failures import Reply, Sent, address_remedy, is_html, key_remedy, words

_OUT_OF_SERVICE = frozenset({500, 502, 503, 504})
_MAX_NAMED = 5
"""Models that a refusal names, if none is close."""


def refusal_of_list(reply: Reply, sent: Sent) -> str | None:
    """Read off a server's answer to the question for its models why judging cannot start, and the remedy.

    None: it can. A server without such a list answers with some other error, and passes.
    """
    said = words(reply, read_error(reply.body))
    status = f"status {reply.status}" + (f': "{said}"' if said else "")
    if reply.status == 401 or (reply.status == 403 and "scope" not in said):
        # A key without the right to list models says that a scope is missing, and may ask all the same.
        return f"refuses the key ({status}): {key_remedy(sent)}"
    if reply.status == 407:
        return f"is behind a proxy that wants a user name and password ({status}): write them into HTTPS_PROXY"
    if 300 <= reply.status < 400:
        return f"moved to {reply.headers.get('location', 'another address')}: correct {sent.prefix}base_url"
    if reply.status in _OUT_OF_SERVICE:
        return f"is not in service ({status}): try again when it is, or correct the address"
    if reply.status >= 300:
        return None
    if is_html(reply):
        return f'answers with a page for browsers ("{said}"): {address_remedy(sent)}'
    return _unknown_model(_listed(reply.body), sent)


def _unknown_model(models: list[str], sent: Sent) -> str | None:
    # Azure lists the models that can be deployed, and is asked by the name of a deployment.
    is_azure = (urlsplit(sent.url).hostname or "").endswith(".azure.com")
    if not models or is_azure or any(_is_named(sent.model, model) for model in models):
        return None
    near = difflib.get_close_matches(sent.model, models, n=3, cutoff=0.5)
    others = near or sorted(models)[:_MAX_NAMED]
    listed = f"did you mean {' or '.join(others)}?" if near else f"it has {', '.join(others)}"
    more = "" if near or len(models) <= _MAX_NAMED else f" and {len(models) - _MAX_NAMED} more"
    return f"does not list the model {sent.model!r}: correct oracle.model; {listed}{more}"


def _is_named(asked: str, listed: str) -> bool:
    """Return whether a listed model may be asked under a name: with or without its folder, its tag, or as a pattern."""
    asked, listed = asked.lower(), listed.lower()
    if fnmatch.fnmatchcase(asked, listed):
        return True
    without_folder = listed.rpartition("/")[2]
    return asked in (listed.partition(":")[0], without_folder) or asked.partition(":")[0] == listed


def _listed(body: str) -> list[str]:
    """Read the names of a list of models; empty if there is none, or only the first page of one."""
    try:
        parsed: object = json.loads(body)
    except (ValueError, RecursionError):
        return []
    fields = cast("dict[str, object]", parsed) if isinstance(parsed, dict) else {"data": parsed}
    models = fields.get("data", fields.get("models"))
    if not isinstance(models, list) or fields.get("has_more"):
        return []
    names: list[str] = []
    for model in cast("list[object]", models):
        entry = cast("dict[str, object]", model) if isinstance(model, dict) else {"id": model}
        name = entry.get("id", entry.get("name", entry.get("model")))
        if isinstance(name, str):
            names.append(name)
    return names
