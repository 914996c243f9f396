"""Caveats of a run: one sentence for each thing that a reader must know before believing its numbers.

Thresholds are ours; they ask for a look, they do not judge.
"""

import math
from collections.abc import Iterator

from rayrl.algorithms.estimate import Estimate
from rayrl.algorithms.pairing import PAIRS_PER_QUERY
from rayrl.report.facts import PolicyFacts, RewardFacts, RunFacts
from rayrl.report.formats import is_above, is_known
from rayrl.report.policies import TrainedPolicy, latest, trained_policies
from rayrl.report.recorded_run import RecordedRun
from rayrl.report.settings import label_queries
from rayrl.runs.stage_metrics import M1, PolicyEvaluation, PpoMetrics
from rayrl.runs.stage_table import (
    DPO,
    EVALUATE,
    FIT_EVALUATOR,
    GENERATE,
    PPO,
    PPO_REFRESHED,
    PSEUDO_LABEL,
    SYNTHESIZE,
    fits_evaluator,
)

MAX_KL_PER_TOKEN = 0.25
"""Nats. Beyond it the policy is far from M1, and a gain may be a broken policy's."""
MAX_RELATIVE_CHANGE = 0.2
"""Of length, distinct-2 and self-BLEU."""
MAX_PERPLEXITY_RATIO = 2.0
MAX_EMPTY_SHARE = 0.1
"""Of queries without an answer, and of samples without text."""
MAX_TRUNCATED_SHARE = 0.5
MAX_LENGTH_CORRELATION = 0.5
"""Spearman's, of reward and length."""
MIN_JUDGED = 100
"""Prompts: the standard error of a win rate is about 0.05 at so many."""


def caveats(facts: RunFacts) -> list[str]:
    """List all caveats of a run, the most serious first. The facts' own list of caveats is not read."""
    trained = trained_policies(facts.run.config)
    over_ppo = f" of {trained[-1].title} over {trained[0].title}"
    return [
        *_of_synthetic_pairs(facts),
        *_of_policies(facts),
        *_of_gain(facts.gain_over_ppo, over_ppo),
        *_of_references(facts),
        *_of_reward_models(facts),
        *_of_evaluator(facts),
        *_of_agreement(facts),
        *_of_queries(facts),
        *_of_leverage(facts),
        *_of_responses(facts),
        *_of_rollouts(facts),
        *_of_evidence(facts),
    ]


def effect_of_no_pairs(run: RecordedRun) -> str | None:
    """Say what followed from synthetic pairs of which none was accepted; None where some were, or none were made."""
    synthesized = run.last(SYNTHESIZE)
    if synthesized is None or synthesized.num_pairs > 0:
        return None
    if run.config.learns_from_comparisons:
        effect = (
            "the refreshed reward model learnt from the old preferences alone, so this run does not test the refresh."
        )
    else:
        effect = "DPO learnt from the scored pairs alone."
    rate = synthesized.embedding_acceptance_rate
    return effect if rate is None else f"{effect} Clusters of embeddings would accept {rate:.1%} of the prompts."


def _of_synthetic_pairs(facts: RunFacts) -> Iterator[str]:
    effect = effect_of_no_pairs(facts.run)
    if effect is not None:
        yield f"No synthetic pair was accepted: {effect}"


def _of_policies(facts: RunFacts) -> Iterator[str]:
    m1 = facts.policy(M1)
    for trained in trained_policies(facts.run.config):
        policy = _latest_policy(facts, trained)
        if policy is None or policy.evaluation is None:
            continue
        # A reward that rose while the score fell says more than that the gain is not significant.
        over_optimised = list(_of_over_optimisation(facts, trained, policy.title, policy.evaluation))
        if over_optimised:
            yield from over_optimised
        else:
            # M2 is the only policy of its run, and needs no name.
            of_policy = "" if trained.stage is DPO else f" of {policy.title}"
            yield from _of_gain(policy.evaluation.difference, of_policy)
            yield from _of_win_rates(policy.evaluation, of_policy)
        if m1 is not None and m1.evaluation is not None:
            yield from _of_text(m1.evaluation, policy.evaluation, trained, policy.title)


def _latest_policy(facts: RunFacts, trained: TrainedPolicy) -> PolicyFacts | None:
    """Find the policy of this training in the last round that was evaluated."""
    names = [policy.name for policy in facts.policies]
    return facts.policy(latest(names, trained.name, facts.run.config.rounds))


def _of_over_optimisation(
    facts: RunFacts, trained: TrainedPolicy, title: str, evaluation: PolicyEvaluation
) -> Iterator[str]:
    """The reward that PPO maximises rose, and the oracle's score did not."""
    training, difference = facts.run.last(trained.stage), evaluation.difference
    if not isinstance(training, PpoMetrics) or difference is None or not is_known(difference):
        return
    if training.final_reward > training.first_reward and difference.mean <= 0:
        yield (
            f"The reward of {title} rose from {training.first_reward:.3g} to {training.final_reward:.3g}, but the "
            f"oracle's score did not ({difference.mean:+.3f} \u00b1 {difference.standard_error:.3f} over M1): "
            "the policy may exploit the reward (over-optimisation). Fewer rollouts or "
            f"{_remedy(trained)} can help."
        )


def _of_gain(difference: Estimate | None, of_policy: str) -> Iterator[str]:
    """A gain that is not more than noise. `of_policy` names it: " of RLP"."""
    if difference is None or not math.isfinite(difference.mean):
        return
    if not is_known(difference):
        yield f"The gain{of_policy} has no standard error and is therefore not shown: raise evaluate.budget."
    elif not is_above(difference):
        yield (
            f"The gain{of_policy} ({difference.mean:+.3f} \u00b1 {difference.standard_error:.3f}) is not above "
            "two standard errors: it may be noise. More evaluation prompts or more seeds can tell."
        )


def _of_win_rates(evaluation: PolicyEvaluation, of_policy: str) -> Iterator[str]:
    if is_above(evaluation.win_rate, 0.5) and not is_above(evaluation.length_controlled_win_rate, 0.5):
        yield (
            f"The win rate{of_policy} is not significant once response length is controlled for: length may explain it."
        )


def _of_text(m1: PolicyEvaluation, policy: PolicyEvaluation, trained: TrainedPolicy, title: str) -> Iterator[str]:
    """Text of a policy that differs much from M1's."""
    if policy.kl is not None and policy.kl_length:
        kl, per_token = policy.kl.mean, policy.kl.mean / policy.kl_length
        if per_token > MAX_KL_PER_TOKEN:
            of_policy = "" if trained.stage is DPO else f" of {title}"
            yield (
                f"KL{of_policy} to M1 is large: {kl:.1f} nats per response, {per_token:.2f} per token. Read the "
                f"samples; {_remedy(trained)} keeps the policy closer."
            )
    for change, before, after, sign in (
        ("Diversity dropped: distinct-2", m1.distinct2, policy.distinct2, -1),
        ("Diversity dropped: self-BLEU (higher is more alike)", m1.self_bleu, policy.self_bleu, 1),
        ("Responses got longer: mean tokens", m1.length, policy.length, 1),
        ("Responses got shorter: mean tokens", m1.length, policy.length, -1),
    ):
        # Length is looked at in both directions; of the other two, only less diversity is a warning.
        if before and sign * (after - before) / before > MAX_RELATIVE_CHANGE:
            yield f"{change} went from {before:.3g} under M1 to {after:.3g} under {title}."
    if m1.perplexity and policy.perplexity and policy.perplexity / m1.perplexity > MAX_PERPLEXITY_RATIO:
        yield (
            f"M1 finds {title}'s text unlikely: perplexity went from {m1.perplexity:.3g} to {policy.perplexity:.3g}."
        )


def _remedy(trained: TrainedPolicy) -> str:
    """Name the settings that keep a policy closer to M1."""
    if trained.stage is DPO:
        return "a larger dpo.beta or a smaller dpo.learning_rate"
    return "a larger ppo.kl_coef or a smaller ppo.learning_rate"


def _of_references(facts: RunFacts) -> Iterator[str]:
    """Reference answers that are missing, and those that the oracle did not rank."""
    evaluated = facts.run.last(EVALUATE)
    references = None if evaluated is None else evaluated.references
    if references is None:
        return
    num = references.num_prompts
    if num == 0:
        yield "No judged prompt has a reference answer: evaluate.reference_answers must answer prompts of the pool."
        return
    for policy in facts.policies:
        reference = policy.reference
        if reference is not None and reference.num_abstained / num > MAX_EMPTY_SHARE:
            yield (
                f"The oracle did not rank {reference.num_abstained} of {num} answers of {policy.title} and the "
                "references: that win rate is of the others alone."
            )


def _of_reward_models(facts: RunFacts) -> Iterator[str]:
    titles = {"r": "reward model r", "refreshed": "refreshed reward model"}
    for name, title in titles.items():
        reward = facts.reward(name)
        if reward is None or reward.model is None:
            continue
        accuracy, correlation = reward.model.validation.accuracy, reward.model.validation.length_correlation
        if accuracy is not None and not is_above(accuracy, 0.5):
            yield f"The {title} orders held-out pairs no better than chance by two standard errors."
        if correlation is not None and abs(correlation.mean) > MAX_LENGTH_CORRELATION:
            yield f"The {title} goes by length: rank correlation {correlation.mean:+.2f} on held-out responses."
    before, after = (_accuracy(facts.reward(name)) for name in titles)
    if before is None or after is None:
        return
    # Both are measured on the same pairs: taken as independent, the error is rather too large.
    fall, error = before.mean - after.mean, math.hypot(before.standard_error, after.standard_error)
    if fall > 2 * error:
        yield f"The refresh made the reward model worse: accuracy {before.mean:.3f} -> {after.mean:.3f}."


def _accuracy(reward: RewardFacts | None) -> Estimate | None:
    return None if reward is None or reward.model is None else reward.model.validation.accuracy


def _of_evaluator(facts: RunFacts) -> Iterator[str]:
    """An evaluator that does not rank held-out judgements as the oracle does."""
    fitted = facts.run.last(FIT_EVALUATOR)
    spearman = None if fitted is None else fitted.validation.spearman
    if spearman is not None and not is_above(spearman):
        yield _no_correlation("held-out judgements")
    labelled = facts.run.last(PSEUDO_LABEL)
    if labelled is not None and labelled.num_too_long:
        yield (
            f"{labelled.num_too_long} of {labelled.num_scored + labelled.num_abstained} responses exceed the "
            "evaluator's context, so that they have no score and are in no pair: raise policy.max_model_len, shorten "
            "rubric.template, or lower generate.max_tokens."
        )


def _no_correlation(where: str) -> str:
    return f"The evaluator's rank correlation with the oracle on {where} is not above zero by two standard errors."


def _of_agreement(facts: RunFacts) -> Iterator[str]:
    """Each policy and the reward that it was trained on: does the reward still agree with the oracle there?"""
    titles = {"r": "r", "refreshed": "The refreshed reward", "reward": "The reward", "evaluator": "The evaluator"}
    for trained in trained_policies(facts.run.config):
        policy = _latest_policy(facts, trained)
        reward = None if trained.reward is None else facts.reward(trained.reward)
        if policy is None or reward is None or policy.name not in reward.agreement:
            continue
        agreement = reward.agreement[policy.name]
        # An evaluator predicts scores, so its ranks count; a reward model only has to order two answers.
        is_evaluator = fits_evaluator(facts.run.config)
        if is_evaluator and agreement.spearman is not None and not is_above(agreement.spearman):
            yield _no_correlation("the new policy's responses")
        if agreement.accuracy is not None and not is_above(agreement.accuracy, 0.5):
            yield (
                f"{titles[reward.name]} cannot be shown to tell answers of {policy.title}, trained on it, from "
                "M1's as the oracle does: not above chance by two standard errors."
            )


def _of_queries(facts: RunFacts) -> Iterator[str]:
    """Paid queries without an answer."""
    for title, paid in (
        (label_queries(facts.run.config), facts.paid.label),
        ("evaluation queries", facts.paid.evaluate),
    ):
        num_spent, num_abstained, num_refunded = paid.spent or 0, paid.abstained or 0, paid.refunded or 0
        # Refunded queries failed for free. They are not spent, but they were asked and have no answer.
        num_asked, num_unanswered = num_spent + num_refunded, num_abstained + num_refunded
        if num_asked and num_unanswered / num_asked > MAX_EMPTY_SHARE:
            yield f"The oracle gave no label to {num_unanswered} of {num_asked} {title}; {num_abstained} were paid."
        if paid.lost:
            yield f"{paid.lost} of {num_spent} {title} were under way when a process died: lost, and perhaps paid."


def _of_leverage(facts: RunFacts) -> Iterator[str]:
    ratio = facts.paid.pairs_per_query
    if ratio is not None and ratio < PAIRS_PER_QUERY and facts.run.config.labels == "proxy":
        yield (
            f"Only {ratio:.1f} preference pairs per paid query, the aim is {PAIRS_PER_QUERY}: add "
            "prompts, or pair by margin."
        )


def _of_responses(facts: RunFacts) -> Iterator[str]:
    """Samples without text, or without an end."""
    generated = facts.run.last(GENERATE)
    if generated is None:
        return
    # Empty samples and repeats are not among the responses.
    num_sampled = generated.num_responses + generated.num_empty + generated.num_duplicates
    if num_sampled and generated.num_empty / num_sampled > MAX_EMPTY_SHARE:
        yield f"{generated.num_empty} of {num_sampled} sampled responses are empty."
    if generated.truncated_share > MAX_TRUNCATED_SHARE:
        yield (
            f"{100 * generated.truncated_share:.0f}% of the responses end at generate.max_tokens: "
            "that text is unfinished."
        )


def _of_rollouts(facts: RunFacts) -> Iterator[str]:
    """Responses of PPO that its reward gave no number."""
    for stage in (PPO, PPO_REFRESHED):
        trained = facts.run.last(stage)
        if trained is None or not trained.num_abstained:
            continue
        num_answered = trained.num_responses + trained.num_abstained
        if trained.num_abstained / num_answered > MAX_EMPTY_SHARE:
            yield (
                f"{stage.name}: {trained.num_abstained} of {num_answered} responses had no reward and taught nothing "
                f"({trained.num_too_long} too long, {trained.num_timed_out} timed out)."
            )


def _of_evidence(facts: RunFacts) -> Iterator[str]:
    """PPO's spread over seeds and prompts."""
    evaluated = facts.run.last(EVALUATE)
    if evaluated is None or not facts.run.has(PPO):
        return
    if evaluated.num_judged < MIN_JUDGED:
        yield (f"Only {evaluated.num_judged} prompts were judged per policy: raise evaluate.budget and pool.num_eval.")
    yield "One seed: standard errors are over prompts, and another seed's PPO can differ by more."
