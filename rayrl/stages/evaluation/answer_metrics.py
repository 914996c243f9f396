"""What answers come to: their scores against another policy's and, without the expert, KL, fluency and variety."""

from dataclasses import asdict
from typing import Any

import numpy as np

from rayrl.algorithms import statistics
from rayrl.fleets.services import Services
from rayrl.records import Checkpoint
from rayrl.stages.evaluation.held_out import Answer

MIN_FOR_LENGTH_CONTROL = 20
"""Judged prompts below which the length regression says nothing."""


def spoken(services: Services, m1: Checkpoint, answers: list[Answer]) -> dict[str, Any]:
    """KL to M1 (nats per response), perplexity under M1, tokens, distinct-2 and self-BLEU of a policy's answers.

    Of a policy that says nothing the first two are None.
    """
    said = [a for a in answers if a.token_ids]
    kl, perplexity = None, None
    if said:
        prompts, responses = [a.prompt_token_ids for a in said], [a.token_ids for a in said]
        under_m1 = np.array(services.generators(m1).call("logprobs", m1, prompts, responses))
        kl = asdict(statistics.kl_estimate(np.array([a.logprob for a in said]), under_m1))
        perplexity = statistics.perplexity(under_m1, np.array([len(a.token_ids) for a in said]))
    texts = [a.text for a in answers]
    return {
        "kl": kl,
        "perplexity": perplexity,
        "length": float(np.mean([len(a.token_ids) for a in answers])),
        "distinct2": statistics.distinct_n(texts, 2),
        "self_bleu": statistics.self_bleu(texts),
    }


def nats(kl: dict[str, Any] | None) -> str:
    """A policy's KL, for a summary."""
    return f"KL {kl['mean']:.2f} nats" if kl else "KL not known: it said nothing"


def against(base: list[Answer], ours: list[Answer]) -> dict[str, Any]:
    """Mean scores, their paired difference and win rates over the prompts where the expert scored both."""
    both = [(a, b) for a, b in zip(base, ours, strict=True) if a.score is not None and b.score is not None]
    names = ("base_score", "score", "difference", "win_rate", "length_controlled_win_rate")
    if len(both) < 2:
        return dict.fromkeys(names)
    theirs = np.array([a.score for a, _ in both], float)
    mine = np.array([b.score for _, b in both], float)
    lengths = [np.array([len(answer.text) for answer in side]) for side in zip(*both, strict=True)]
    wins = np.where(mine > theirs, 1.0, np.where(mine < theirs, 0.0, 0.5))
    zero = np.zeros(len(both))
    values = [
        statistics.paired_difference(theirs, zero),
        statistics.paired_difference(mine, zero),
        statistics.paired_difference(mine, theirs),
        statistics.win_rate(mine, theirs),
        statistics.length_controlled_win_rate(wins, lengths[1], lengths[0])
        if len(both) >= MIN_FOR_LENGTH_CONTROL
        else None,
    ]
    return {name: asdict(value) if value else None for name, value in zip(names, values, strict=True)}
