"""Metrics of a policy's answers: scores against M1's and, without the oracle, KL, fluency and variety."""

import numpy as np

from rayrl.algorithms import statistics
from rayrl.algorithms.estimate import Estimate
from rayrl.fleets.services import Services
from rayrl.records import Checkpoint
from rayrl.runs.stage_metrics import PolicyEvaluation
from rayrl.stages.evaluation.held_out import HeldOut

MIN_FOR_LENGTH_CONTROL = 20
"""Judged prompts below which the length regression says nothing."""
MIN_JUDGED = 2
"""Judged prompts below which there is no standard error."""


def measure_policy(
    services: Services,
    m1: Checkpoint,
    base: list[HeldOut],
    answers: list[HeldOut],
    *,
    own: list[HeldOut] | None = None,
    kl_bound: float | None = None,
) -> PolicyEvaluation:
    """Measure a policy's answers beside M1's.

    Args:
        services: fleets; a generator reads the answers under M1.
        m1: the weights that the KL and the perplexity are measured under.
        base: M1's answers to the same prompts.
        answers: the policy's.
        own: samples of the policy at temperature 1 without truncation, on which its KL is measured: log-probabilities
            are those at temperature 1, and samples from another distribution would bias it. May be `answers`
            themselves; None is M1, at a distance of 0 from itself.
        kl_bound: where there are no samples of the policy itself (best of n), an upper bound of its KL.
    """
    written = [answer for answer in answers if answer.token_ids]
    under_m1 = _logprobs(services, m1, written)
    perplexity = statistics.perplexity(under_m1, _num_tokens(written)) if written else None
    samples: list[HeldOut] = []
    if kl_bound is not None:
        kl = Estimate(kl_bound, 0.0, len(answers))
    elif own is None:
        kl = Estimate(0.0, 0.0, len(answers))
    else:
        samples = [sample for sample in own if sample.token_ids]
        samples_under_m1 = under_m1 if own is answers else _logprobs(services, m1, samples)
        logprobs = np.array([sample.logprob for sample in samples])
        kl = statistics.kl_estimate(logprobs, samples_under_m1) if samples else None
    texts = [answer.text for answer in answers]
    judged = [(a, b) for a, b in zip(base, answers, strict=True) if a.score is not None and b.score is not None]
    is_judged = len(judged) >= MIN_JUDGED
    theirs = np.array([a.score for a, _ in judged], float)
    ours = np.array([b.score for _, b in judged], float)
    # A mean with its standard error is a paired difference to nothing.
    zero = np.zeros(len(judged))
    return PolicyEvaluation(
        kl=kl,
        kl_is_bound=kl_bound is not None,
        kl_length=float(np.mean(_num_tokens(samples))) if samples else None,
        perplexity=perplexity,
        length=float(np.mean([len(answer.token_ids) for answer in answers])),
        distinct2=statistics.distinct_n(texts, 2),
        self_bleu=statistics.self_bleu(texts),
        score=statistics.paired_difference(ours, zero) if is_judged else None,
        base_score=statistics.paired_difference(theirs, zero) if is_judged else None,
        difference=statistics.paired_difference(ours, theirs) if is_judged else None,
        win_rate=statistics.win_rate(ours, theirs) if is_judged else None,
        length_controlled_win_rate=_length_controlled_win_rate(judged),
    )


def _logprobs(services: Services, m1: Checkpoint, answers: list[HeldOut]) -> np.ndarray:
    """Read the log-probabilities of answers under M1, (answers,), nats."""
    if not answers:
        return np.zeros(0)
    prompts = [answer.prompt_token_ids for answer in answers]
    responses = [answer.token_ids for answer in answers]
    return np.array(services.generators(m1).call("logprobs", m1, prompts, responses))


def _num_tokens(answers: list[HeldOut]) -> np.ndarray:
    return np.array([len(answer.token_ids) for answer in answers])


def _length_controlled_win_rate(judged: list[tuple[HeldOut, HeldOut]]) -> Estimate | None:
    """Return the win rate of the second answers had both been equally long; None with too few for the regression."""
    if len(judged) < MIN_FOR_LENGTH_CONTROL:
        return None
    theirs = np.array([a.score for a, _ in judged], float)
    ours = np.array([b.score for _, b in judged], float)
    # A tie is half a win.
    wins = np.where(ours > theirs, 1.0, np.where(ours < theirs, 0.0, 0.5))
    our_lengths = np.array([len(b.text) for _, b in judged])
    their_lengths = np.array([len(a.text) for a, _ in judged])
    return statistics.length_controlled_win_rate(wins, our_lengths, their_lengths)


def nats(kl: Estimate | None) -> str:
    """Write a policy's KL for a summary."""
    return f"KL {kl.mean:.2f} nats" if kl else "KL unknown: no answer had any text"
