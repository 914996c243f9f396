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
MIN_PAIRS_PER_QUERY = 9
"""The paper's ratio of pseudo-labelled pairs to paid queries (arXiv 2407.02119)."""


def caveats(facts: dict[str, Any]) -> list[str]:
    """All caveats of a run, the most serious first. `facts` as made by `summarize_run`."""
    evaluated = facts["metrics"]["evaluate"]
    return [
        *_of_gain(evaluated),
        *_of_policy(evaluated),
        *_of_evaluator(facts["metrics"]),
        *_of_money(facts),
        *_of_responses(facts["metrics"]["generate"]),
    ]


def significant(estimate: dict[str, Any] | None, *, above: float = 0.0) -> bool:
    """Whether an estimate lies more than two standard errors above a value; False if that is not known."""
    if not estimate or estimate.get("mean") is None or estimate.get("standard_error") is None:
        return False
    return estimate["mean"] - above > 2 * estimate["standard_error"]


def _of_gain(evaluated: dict[str, Any]) -> Iterator[str]:
    difference = evaluated.get("difference")
    if not difference or difference.get("mean") is None:
        return
    if difference.get("standard_error") is None:
        yield "The gain has no standard error and is therefore not shown: raise evaluate.budget."
    elif not significant(difference):
        yield (
            f"The gain ({difference['mean']:+.3f} \u00b1 {difference['standard_error']:.3f}) is not above "
            "two standard errors: it may be noise. More evaluation prompts or more seeds can tell."
        )
    if significant(evaluated.get("win_rate"), above=0.5) and not significant(
        evaluated.get("length_controlled_win_rate"), above=0.5
    ):
        yield "The win rate is not significant once response length is controlled for: length may explain it."


def _of_policy(evaluated: dict[str, Any]) -> Iterator[str]:
    kl, length = (evaluated.get("kl") or {}).get("mean"), evaluated.get("length_m2")
    if kl is not None and length and kl / length > MAX_KL_PER_TOKEN:
        yield (
            f"KL to M1 is large: {kl:.1f} nats per response, {kl / length:.2f} per token. Read the samples; "
            "a larger dpo.beta or a smaller dpo.learning_rate keeps the policy closer."
        )
    for name, title, sign in (
        ("distinct2", "Diversity dropped: distinct-2", -1),
        ("self_bleu", "Diversity dropped: self-BLEU (higher is more alike)", 1),
        ("length", "Responses got longer: mean tokens", 1),
        ("length", "Responses got shorter: mean tokens", -1),
    ):
        before, after = evaluated.get(f"{name}_m1"), evaluated.get(f"{name}_m2")
        if before and after is not None and sign * (after - before) / before > MAX_RELATIVE_CHANGE:
            yield f"{title} went from {before:.3g} under M1 to {after:.3g} under M2."
    before, after = evaluated.get("perplexity_m1"), evaluated.get("perplexity_m2")
    if before and after and after / before > MAX_PERPLEXITY_RATIO:
        yield f"M1 finds M2's text unlikely: perplexity went from {before:.3g} to {after:.3g}."


def _of_evaluator(metrics: dict[str, Any]) -> Iterator[str]:
    held_out = metrics["fit_evaluator"].get("validation", {}).get("spearman")
    moved = metrics["evaluate"].get("evaluator_spearman")
    for estimate, where in ((held_out, "held-out judgements"), (moved, "the new policy's responses")):
        if estimate and not significant(estimate):
            yield (
                f"The evaluator's rank correlation with the expert on {where} is not above zero by two standard errors."
            )


def _of_money(facts: dict[str, Any]) -> Iterator[str]:
    for purpose, title in (("label", "label queries"), ("evaluate", "evaluation queries")):
        count = facts["paid"][purpose]
        spent, abstained, lost, refunded = (count.get(name) or 0 for name in ("spent", "abstained", "lost", "refunded"))
        asked, unanswered = spent + refunded, abstained + refunded
        if asked and unanswered / asked > MAX_EMPTY_SHARE:
            yield f"The expert gave no label to {unanswered} of {asked} {title}; {abstained} were paid."
        if lost:
            yield f"{lost} of {spent} {title} were under way when a process died: lost, and perhaps paid."
    ratio = facts["paid"]["pairs_per_query"]
    if ratio is not None and ratio < MIN_PAIRS_PER_QUERY and facts["config"].get("labels", "proxy") == "proxy":
        yield (
            f"Only {ratio:.1f} preference pairs per paid query, the aim is {MIN_PAIRS_PER_QUERY}: add "
            "prompts, or pair by margin."
        )


def _of_responses(generated: dict[str, Any]) -> Iterator[str]:
    num, empty = generated.get("num_responses"), generated.get("num_empty") or 0
    if num and empty / num > MAX_EMPTY_SHARE:
        yield f"{empty} of {num} responses are empty."
    truncated = generated.get("truncated_share")
    if truncated is not None and truncated > MAX_TRUNCATED_SHARE:
        yield f"{100 * truncated:.0f}% of the responses end at generate.max_tokens: that text is unfinished."
