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
    services: Services, m1: Checkpoint, base: list[HeldOut], answers: list[HeldOut], *, kl_bound: float | None = None
) -> PolicyEvaluation:
    """Measure a policy's answers beside M1's.

    Args:
        services: fleets; a generator reads the answers under M1.
        m1: the weights that the KL and the perplexity are measured under.
        base: M1's answers to the same prompts.
        answers: the policy's.
        kl_bound: where M1's own log-probabilities say nothing of the policy (best of n), an upper bound of its KL.
    """
    written = [answer for answer in answers if answer.token_ids]
    kl, perplexity = None, None
    if written:
        prompts = [answer.prompt_token_ids for answer in written]
        responses = [answer.token_ids for answer in written]
        # KL and perplexity are read off the policy's own samples, under M1.
        under_m1 = np.array(services.generators(m1).call("logprobs", m1, prompts, responses))
        kl = statistics.kl_estimate(np.array([answer.logprob for answer in written]), under_m1)
        perplexity = statistics.perplexity(under_m1, np.array([len(tokens) for tokens in responses]))
    if kl_bound is not None:
        kl = Estimate(kl_bound, 0.0, len(answers))
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
