"""Metrics of answers, empty ones included."""

import numpy as np
import pytest

from rayrl.algorithms.estimate import Estimate
from rayrl.records import Checkpoint
from rayrl.stages.evaluation.answer_metrics import measure_policy, nats
from rayrl.stages.evaluation.evaluate import _summary
from rayrl.stages.evaluation.held_out import HeldOut

M1 = Checkpoint(path="m1", version="m1")


class Logprobs:
    """M1, which gives every token one log-probability; asked about nothing it fails, as engines do."""

    def generators(self, checkpoint):
        return self

    def call(self, method, checkpoint, prompts, responses):
        assert method == "logprobs" and prompts and all(responses)
        return [-2.0 * len(response) for response in responses]


def answer(num_tokens, score=None):
    return HeldOut(
        prompt_id="p",
        prompt="?",
        prompt_token_ids=[1],
        text="word " * num_tokens,
        token_ids=[7] * num_tokens,
        logprob=-1.0 * num_tokens,
        score=score,
    )


def measured(base, answers, **options):
    return measure_policy(Logprobs(), M1, base, answers, **options)  # type: ignore[arg-type]


def test_kl_and_perplexity_are_of_what_was_said():
    answers = [answer(2), answer(0), answer(4)]
    row = measured(answers, answers, own=answers)
    assert row.kl is not None and row.kl.mean == pytest.approx(3.0) and row.kl.num == 2
    assert row.kl_length == 3.0
    assert (row.perplexity, row.length) == (pytest.approx(np.exp(2)), 2.0)
    assert row.difference is None and row.win_rate is None, "nothing was judged"


SHARES = {"m1": np.array([0.25, 0.25, 0.5]), "policy": np.array([0.6, 0.3, 0.1])}
"""Probabilities of three tokens."""


class Categorical:
    """M1, which says one of three tokens."""

    def generators(self, checkpoint):
        return self

    def call(self, method, checkpoint, prompts, responses):
        return [float(np.log(SHARES["m1"][token])) for (token,) in responses]


def said_by_policy(temperature, num=4000):
    """Answers of one token, whose log-probabilities are those at temperature 1 as the engines report them."""
    weights = SHARES["policy"] ** (1 / temperature)
    tokens = np.random.default_rng(0).choice(3, num, p=weights / weights.sum())
    return [
        HeldOut(
            prompt_id="p",
            prompt="?",
            prompt_token_ids=[1],
            text="word",
            token_ids=[int(token)],
            logprob=float(np.log(SHARES["policy"][token])),
        )
        for token in tokens
    ]


def test_the_kl_is_of_the_policy_itself_whatever_its_answers_are_sampled_with():
    truth = float(np.sum(SHARES["policy"] * np.log(SHARES["policy"] / SHARES["m1"])))
    cold, own = said_by_policy(0.5), said_by_policy(1.0)
    row = measure_policy(Categorical(), M1, cold, cold, own=own)  # type: ignore[arg-type]
    assert row.kl is not None and row.kl.mean == pytest.approx(truth, abs=3 * row.kl.standard_error)
    biased = measure_policy(Categorical(), M1, cold, cold, own=cold).kl  # type: ignore[arg-type]
    assert biased is not None and biased.mean > truth + 10 * biased.standard_error
    assert measure_policy(Categorical(), M1, cold, cold).kl == Estimate(0.0, 0.0, 4000)  # type: ignore[arg-type]


def test_a_bound_of_the_kl_replaces_the_measurement():
    answers = [answer(2), answer(4)]
    row = measured(answers, answers, kl_bound=0.64)
    assert row.kl == Estimate(0.64, 0.0, 2) and row.kl_is_bound


def test_a_policy_that_says_nothing_is_measured_all_the_same():
    mute = [answer(0, score=0.0), answer(0, score=0.0)]
    row = measured([answer(3, 2.0), answer(3, 4.0)], mute, own=mute)
    assert (row.kl, row.perplexity, row.length, row.distinct2) == (None, None, 0.0, 0.0)
    assert row.difference is not None and row.difference.mean == -3.0
    assert _summary("m2", row) == (
        "m2 oracle score 3.00 -> 0.00, gain -3.000 +- 1.000 on 2 prompts, KL unknown: no answer had any text"
    )
    assert nats(Estimate(1.234, 0.1, 5)) == "KL 1.23 nats"


def test_the_length_regression_waits_for_enough_prompts():
    few, many = ([answer(3, float(n % 4)) for n in range(num)] for num in (19, 20))
    longer = [answer(5, 3.0) for _ in many]
    assert measured(few, longer[:19]).length_controlled_win_rate is None
    assert measured(many, longer).length_controlled_win_rate is not None
