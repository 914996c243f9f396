"""What a reader must know before believing a run's numbers: one sentence for each thing that looks wrong.

Thresholds are ours; they ask for a look, they do not judge.
"""

from collections.abc import Iterator
from typing import Any

MAX_KL_PER_TOKEN = 0.25
"""Nats. Beyond it the policy is far from M1, and a gain may be a broken policy's."""
MAX_RELATIVE_CHANGE = 0.2
"""Of length, distinct-2 and self-BLEU."""
MAX_PERPLEXITY_RATIO = 2.0
MAX_EMPTY_SHARE = 0.1
"""Of questions without an answer, and of responses without text."""
MAX_TRUNCATED_SHARE = 0.5
SPOKEN = ("length", "perplexity", "distinct2", "self_bleu")
"""What `evaluate` measures of a policy's text."""
MIN_PAIRS_PER_QUERY = 9
"""The paper's ratio of pseudo-labelled pairs to paid queries (arXiv 2407.02119)."""


def caveats(facts: dict[str, Any]) -> list[str]:
    """All caveats of a run, the most serious first. `facts` as made by `summarize_run`."""
    evaluated = facts["metrics"]["evaluate"]
    m1, m2 = ({name: evaluated.get(f"{name}_{policy}") for name in SPOKEN} for policy in ("m1", "m2"))
    return [
        *of_gain(evaluated),
        *of_policy(m1, m2 | {"kl": evaluated.get("kl")}, "M2", "a larger dpo.beta or a smaller dpo.learning_rate"),
        *of_references(evaluated),
        *of_evaluator(facts["metrics"]),
        *of_money(facts, "label queries"),
        *_of_leverage(facts),
        *of_responses(facts["metrics"]["generate"]),
    ]


def significant(estimate: dict[str, Any] | None, *, above: float = 0.0) -> bool:
    """Whether an estimate lies more than two standard errors above a value; False if that is not known."""
    if not estimate or estimate.get("mean") is None or estimate.get("standard_error") is None:
        return False
    return estimate["mean"] - above > 2 * estimate["standard_error"]


def of_gain(evaluated: dict[str, Any], of: str = "") -> Iterator[str]:
    """About a gain and its win rates: is it more than noise, and more than length? `of` names it: " of RLP"."""
    difference = evaluated.get("difference")
    if not difference or difference.get("mean") is None:
        return
    if difference.get("standard_error") is None:
        yield f"The gain{of} has no standard error and is therefore not shown: raise evaluate.budget."
    elif not significant(difference):
        yield (
            f"The gain{of} ({difference['mean']:+.3f} \u00b1 {difference['standard_error']:.3f}) is not above "
            "two standard errors: it may be noise. More evaluation prompts or more seeds can tell."
        )
    if significant(evaluated.get("win_rate"), above=0.5) and not significant(
        evaluated.get("length_controlled_win_rate"), above=0.5
    ):
        yield f"The win rate{of} is not significant once response length is controlled for: length may explain it."


def of_policy(m1: dict[str, Any], policy: dict[str, Any], name: str, remedy: str) -> Iterator[str]:
    """About what a policy says compared with M1; `SPOKEN` and "kl" of it. `remedy` keeps it closer to M1."""
    kl, length = (policy.get("kl") or {}).get("mean"), policy.get("length")
    if kl is not None and length and kl / length > MAX_KL_PER_TOKEN:
        of = "" if name == "M2" else f" of {name}"
        yield (
            f"KL{of} to M1 is large: {kl:.1f} nats per response, {kl / length:.2f} per token. Read the samples; "
            f"{remedy} keeps the policy closer."
        )
    for measure, title, sign in (
        ("distinct2", "Diversity dropped: distinct-2", -1),
        ("self_bleu", "Diversity dropped: self-BLEU (higher is more alike)", 1),
        ("length", "Responses got longer: mean tokens", 1),
        ("length", "Responses got shorter: mean tokens", -1),
    ):
        before, after = m1.get(measure), policy.get(measure)
        if before and after is not None and sign * (after - before) / before > MAX_RELATIVE_CHANGE:
            yield f"{title} went from {before:.3g} under M1 to {after:.3g} under {name}."
    before, after = m1.get("perplexity"), policy.get("perplexity")
    if before and after and after / before > MAX_PERPLEXITY_RATIO:
        yield f"M1 finds {name}'s text unlikely: perplexity went from {before:.3g} to {after:.3g}."


def of_evaluator(metrics: dict[str, Any]) -> Iterator[str]:
    """About an evaluator's agreement with the expert."""
    held_out = metrics["fit_evaluator"].get("validation", {}).get("spearman")
    moved = metrics["evaluate"].get("evaluator_spearman")
    for estimate, where in ((held_out, "held-out judgements"), (moved, "the new policy's responses")):
        if estimate and not significant(estimate):
            yield (
                f"The evaluator's rank correlation with the expert on {where} is not above zero by two standard errors."
            )


def of_references(evaluated: dict[str, Any]) -> Iterator[str]:
    """About reference answers that are not there, and about those that the expert did not rank."""
    references = evaluated.get("references") or {}
    num = references.get("num_prompts")
    if num == 0:
        yield "No judged prompt has a reference answer: evaluate.reference_answers must answer prompts of the pool."
    for name, policy in references.get("policies", {}).items():
        if num and policy["num_abstained"] / num > MAX_EMPTY_SHARE:
            yield (
                f"The expert did not rank {policy['num_abstained']} of {num} answers of {name} and the references: "
                "that win rate is of the others alone."
            )


def of_money(facts: dict[str, Any], label_queries: str) -> Iterator[str]:
    """About paid queries that got no answer."""
    for purpose, title in (("label", label_queries), ("evaluate", "evaluation queries")):
        count = facts["paid"][purpose]
        spent, abstained, lost, refunded = (count.get(name) or 0 for name in ("spent", "abstained", "lost", "refunded"))
        asked, unanswered = spent + refunded, abstained + refunded
        if asked and unanswered / asked > MAX_EMPTY_SHARE:
            yield f"The expert gave no label to {unanswered} of {asked} {title}; {abstained} were paid."
        if lost:
            yield f"{lost} of {spent} {title} were under way when a process died: lost, and perhaps paid."


def _of_leverage(facts: dict[str, Any]) -> Iterator[str]:
    ratio = facts["paid"]["pairs_per_query"]
    if ratio is not None and ratio < MIN_PAIRS_PER_QUERY and facts["config"].get("labels", "proxy") == "proxy":
        yield (
            f"Only {ratio:.1f} preference pairs per paid query, the aim is {MIN_PAIRS_PER_QUERY}: add "
            "prompts, or pair by margin."
        )


def of_responses(generated: dict[str, Any]) -> Iterator[str]:
    """About responses that say nothing, or do not end."""
    num, empty = generated.get("num_responses"), generated.get("num_empty") or 0
    if num and empty / num > MAX_EMPTY_SHARE:
        yield f"{empty} of {num} responses are empty."
    truncated = generated.get("truncated_share")
    if truncated is not None and truncated > MAX_TRUNCATED_SHARE:
        yield f"{100 * truncated:.0f}% of the responses end at generate.max_tokens: that text is unfinished."
