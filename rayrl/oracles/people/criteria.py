"""Criteria by which people judge, in words made of the rubric, and the form of their answers."""

import re

from rayrl.models.judge_prompt import ADDITIVE_RUBRIC, Rubric
from rayrl.oracles.people.desk import CANNOT_SAY, Kind

JUDGEMENT = """\
Judge how well the response serves the person who wrote the prompt. Start at 0 and add one point for each of these \
that holds:
1. It is on topic and tells the reader something useful, even if incomplete or mixed with irrelevant content.
2. It covers a substantial part of what was asked, even if it leaves some of it open.
3. It answers the essentials of what was asked in a way the reader can use.
4. It speaks as a helpful assistant would, answers the request directly and completely, and is well organised.
5. It is made for this very request by someone who knows the subject, with insight and nothing superfluous."""
"""The built-in rubric of judges (`ADDITIVE_RUBRIC`), for people."""
COMPARISON = """\
Decide which of the two responses serves the person who wrote the prompt better. Weigh, in this order: whether a \
response is on topic and tells the reader something useful; how much of what was asked it covers, and whether that is \
right; whether it is direct, complete and well organised; and whether it is made for this very request, with nothing \
superfluous. Neither the order of the responses nor their length is a merit."""
"""The built-in comparison of judges (`PAIRWISE_RUBRIC`), for people."""
_FENCED = re.compile(r"<(prompt|conversation|response)\b[^>]*>\s*\{\w+\}\s*</\1>")


def criteria(rubric: Rubric, kind: Kind) -> str:
    """Write what people judge by: the built-in rubric in words for people, or the user's template around its texts."""
    if kind == "judgements":
        return JUDGEMENT if rubric.template == ADDITIVE_RUBRIC else _without_texts(rubric.template)
    return COMPARISON if rubric.pairwise is None else _without_texts(rubric.pairwise)


def answer_form(rubric: Rubric, kind: Kind) -> str:
    """Say what an answer may be."""
    if kind == "judgements":
        return f"a number from {rubric.min_score} to {rubric.max_score}, or: {CANNOT_SAY}"
    return f"first, second or tie, or: {CANNOT_SAY}"


def _without_texts(template: str) -> str:
    """Take the places of the judged texts out of a template: people see those beside it."""
    return re.sub(r"\n{3,}", "\n\n", _FENCED.sub("", template)).strip()
