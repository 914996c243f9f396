"""Questions on their way through the oracle pool: address, price and ask them, and fill in the answer.

A question is a `Judgement` or a `Comparison`, and so is its answer: the same record with more fields filled in. The
pool and the ledger treat both kinds alike; all differences between the two are here.
"""

from dataclasses import replace
from typing import TypeVar

from rayrl.models.judge_prompt import Rubric
from rayrl.models.pairwise_prompt import pairwise_version
from rayrl.oracles.completions import well_formed
from rayrl.oracles.protocol import PREFERENCE_SHARES, Named, Oracle, Verdict
from rayrl.records import Comparison, Judgement, Preference, Status, content_id
from rayrl.runs.stage_table import Purpose

Question = TypeVar("Question", Judgement, Comparison)

BUDGET_EXHAUSTED = "budget exhausted"
"""Rationale of an abstention that was never asked, because nothing was left to pay with."""

_PREFERENCES: dict[float, Preference] = {share: preference for preference, share in PREFERENCE_SHARES.items()}


def address(question: Question, oracle: Named, rubric: Rubric, purpose: Purpose) -> Question:
    """Fill in which oracle is asked, out of which budget, and the key under which the answer is paid once.

    The key is made of the texts, the oracle and the rubric. Ids and purpose are not in it, so that the same question
    is paid once for all rounds and purposes.
    """
    assert question.status == "asked", "an answer is not asked again"
    if isinstance(question, Judgement):
        texts = (question.prompt, question.response)
        name, version = oracle.name, rubric.version
    else:
        texts = (question.prompt, question.first, question.second)
        name, version = oracle.comparer, pairwise_version(rubric)
    return replace(question, key=content_id(*texts, name, version), oracle=name, purpose=purpose)


def estimate_usd(question: Judgement | Comparison, oracle: Oracle) -> float | None:
    """Bound the price of a question from above; None where the oracle has no price."""
    if isinstance(question, Judgement):
        return oracle.estimate_usd(question.prompt, question.response)
    return oracle.estimate_usd(question.prompt, question.first, question.second)


async def call(question: Judgement | Comparison, oracle: Oracle) -> Verdict:
    """Put a question to the oracle. This is the call that costs money."""
    if isinstance(question, Judgement):
        return await oracle.judge(question.prompt, question.response)
    return await oracle.compare(question.prompt, question.first, question.second)


def answered(question: Question, verdict: Verdict) -> Question:
    """Fill in the result of a call. An abstention that was not billed costs nothing, whatever it was priced at."""
    cost_usd = 0.0 if verdict.is_refunded else verdict.cost_usd
    rationale = well_formed(verdict.rationale)
    if isinstance(question, Judgement):
        status: Status = "abstained" if verdict.score is None else "scored"
        return replace(question, status=status, score=verdict.score, rationale=rationale, cost_usd=cost_usd)
    preference = None if verdict.score is None else _PREFERENCES.get(verdict.score)
    if verdict.score is not None and preference is None:
        # An oracle type with a fault. The call was paid for, so it must end in the ledger.
        rationale = f"the score of a comparison must be one of {sorted(_PREFERENCES)}, got {verdict.score}"
    status = "abstained" if preference is None else "scored"
    return replace(question, status=status, preference=preference, rationale=rationale, cost_usd=cost_usd)


def reused(question: Question, paid: Judgement | Comparison) -> Question:
    """Fill in the result of an answer with the same key. It is free: the cost stays with the question that was paid."""
    assert paid.key == question.key
    if isinstance(question, Judgement):
        assert isinstance(paid, Judgement)
        return replace(question, status=paid.status, score=paid.score, rationale=paid.rationale)
    assert isinstance(paid, Comparison)
    return replace(question, status=paid.status, preference=paid.preference, rationale=paid.rationale)


def settled_by(question: Question, people: Question) -> Question:
    """Put the answer of people in the place of the judges' to the same texts, whose key the question keeps."""
    if isinstance(question, Judgement):
        assert isinstance(people, Judgement)
        settled = replace(question, score=people.score)
    else:
        assert isinstance(people, Comparison)
        settled = replace(question, preference=people.preference)
    costs = [each.cost_usd for each in (question, people) if each.cost_usd is not None]
    return replace(
        settled,
        status=people.status,
        oracle=people.oracle,
        rationale=people.rationale,
        cost_usd=sum(costs) if costs else None,
    )


def refused(question: Question, reason: str) -> Question:
    """Abstain on a question that was never asked."""
    return replace(question, status="abstained", rationale=reason)
