"""What answers come to, those that say nothing too."""

import numpy as np
import pytest

from rayrl.records import Checkpoint
from rayrl.stages.evaluation.answer_metrics import against, nats, spoken
from rayrl.stages.evaluation.evaluate_policies import _gain
from rayrl.stages.evaluation.held_out import Answer

M1 = Checkpoint(path="m1", version="m1")


class Logprobs:
    """M1, which gives every token one log-probability; asked about nothing it fails, as engines do."""

    def generators(self, checkpoint):
        return self

    def call(self, method, checkpoint, prompts, responses):
        assert method == "logprobs" and prompts and all(responses)
        return [-2.0 * len(response) for response in responses]


def answer(num_tokens, score=None):
    return Answer(
        prompt_id="p",
        prompt="?",
        prompt_token_ids=[1],
        text="word " * num_tokens,
        token_ids=[7] * num_tokens,
        logprob=-1.0 * num_tokens,
        score=score,
    )


def test_kl_and_perplexity_are_of_what_was_said():
    said = spoken(Logprobs(), M1, [answer(2), answer(0), answer(4)])  # type: ignore[arg-type]
    assert said["kl"]["mean"] == pytest.approx(3.0) and said["kl"]["num"] == 2
    assert (said["perplexity"], said["length"]) == (pytest.approx(np.exp(2)), 2.0)


def test_a_policy_that_says_nothing_is_measured_all_the_same():
    mute = [answer(0, score=0.0), answer(0, score=0.0)]
    row = spoken(Logprobs(), M1, mute) | against([answer(3, 2.0), answer(3, 4.0)], mute)  # type: ignore[arg-type]
    assert (row["kl"], row["perplexity"], row["length"], row["distinct2"]) == (None, None, 0.0, 0.0)
    assert row["difference"]["mean"] == -3.0
    assert _gain(row) == "-3.000 +- 1.000, KL not known: it said nothing"
    assert nats({"mean": 1.234}) == "KL 1.23 nats"
