"""Rewards of one model and of an ensemble, and their order of pairs."""

import math
from dataclasses import replace

import numpy as np
import pytest
from scipy.special import expit

from rayrl.config import RewardModelConfig
from rayrl.fleets.fleet import MAX_PART, Fleet
from rayrl.records import Checkpoint, PreferencePair, Scored
from rayrl.stages.rewards.reward_models import RewardScorer, pair_items, validate_pairs

MEMBERS = tuple(Checkpoint(path=f"/{name}", version=name) for name in "ab")


class Values(Fleet):
    """A fleet of one without a replica: member "a" counts tokens, "b" is minus ten times the first token."""

    concurrency = 2  # of one replica

    def __init__(self):
        super().__init__("values", None)
        self.calls = []

    def call(self, method, checkpoint, inputs, **_):
        assert method == "values"
        self.calls.append((checkpoint.version, len(inputs)))
        if checkpoint.version == "a":
            return np.array([float(len(tokens)) for tokens in inputs])
        return np.array([-10.0 * tokens[0] for tokens in inputs])


def item(*token_ids):
    return Scored(prompt="?", response="!", token_ids=list(token_ids))


def scorer(members=MEMBERS, max_tokens=100, **config):
    return RewardScorer(
        members=members,
        means=(2.0, -20.0)[: len(members)],
        stds=(0.5, 10.0),
        fleet=Values(),
        config=RewardModelConfig(**config),
        max_tokens=max_tokens,
    )


ITEMS = [item(1, 1, 1), item(3), item(2, 2)]
STANDARD = np.array([[2.0, -2.0, 0.0], [1.0, -1.0, 0.0]])  # (3, 1, 2) tokens and (-10, -30, -20)


def test_a_single_models_values_stay_as_they_are():
    assert scorer(MEMBERS[:1]).score(ITEMS) == [3.0, 1.0, 2.0]
    assert scorer(MEMBERS[:1], objective="worst_case").score(ITEMS) == [3.0, 1.0, 2.0]


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"objective": "mean"}, STANDARD.mean(0)),
        ({"objective": "worst_case"}, STANDARD.min(0)),
        ({"objective": "uncertainty_weighted", "variance_coef": 2.0}, STANDARD.mean(0) - 2.0 * STANDARD.var(0)),
    ],
    ids=lambda value: value.get("objective") if isinstance(value, dict) else "",
)
def test_members_are_standardised_before_they_are_combined(config, expected):
    assert scorer(**config).score(ITEMS) == pytest.approx(expected)


def test_a_member_with_one_value_for_all_counts_as_nothing():
    constant = replace(scorer(), stds=(0.5, 0.0))
    assert all(math.isfinite(reward) for reward in constant.score(ITEMS))


def test_all_items_are_scored_with_one_member_before_the_next():
    many = scorer()
    many.score([item(1)] * (2 * MAX_PART + 1))
    assert [version for version, _ in many.fleet.calls] == ["a"] * 3 + ["b"] * 3
    assert sum(num for version, num in many.fleet.calls if version == "a") == 2 * MAX_PART + 1


def test_sequences_beyond_the_context_abstain_and_nothing_is_scored_as_nothing():
    reasons = {}
    assert scorer(MEMBERS[:1], max_tokens=2).score(ITEMS, reasons) == [None, 1.0, 2.0]
    assert reasons == {0: "too_long"}
    assert scorer().score([]) == []


def pair(prompt_id, chosen_tokens, rejected_tokens):
    return PreferencePair(
        prompt_id=prompt_id,
        prompt="?",
        prompt_token_ids=[1],
        chosen_id=f"{prompt_id}-0",
        rejected_id=f"{prompt_id}-1",
        chosen="good",
        rejected="bad",
        chosen_token_ids=[5] * chosen_tokens,
        rejected_token_ids=[6] * rejected_tokens,
        chosen_score=1.0,
        rejected_score=0.0,
        chosen_reference_logprob=0.0,
        rejected_reference_logprob=0.0,
        source="data",
    )


def test_pairs_are_validated_as_by_hand():
    pairs = [pair("p", 4, 2), pair("p", 3, 1), pair("q", 5, 9), pair("r", 1, 2)]
    chosen, rejected = [2.0, 1.0, 0.5, 3.0], [1.0, 2.0, 0.5, 0.0]  # right, wrong, a tie, right
    found = validate_pairs(pairs, chosen + rejected)
    assert (found.num, found.num_abstained) == (4, 0)
    shares = [0.5, 0.5, 1.0]  # of the prompts
    assert found.accuracy.mean == pytest.approx(np.mean(shares))
    assert found.accuracy.standard_error == pytest.approx(np.std(shares, ddof=1) / math.sqrt(3))
    assert found.accuracy.num == 3
    assert found.mean_margin == pytest.approx(0.75)
    sure, unsure, very = expit(1.0), 0.5, expit(3.0)
    error = abs(2 * sure - 1) + abs(unsure - 0.5) + abs(very - 1)
    assert found.calibration_error == pytest.approx(error / 4)
    assert -1 < found.length_correlation.mean < 1


def test_a_reward_that_likes_long_responses_is_found_out():
    pairs = [pair(f"p{n}", n % 7 + 1, n % 5 + 2) for n in range(20)]
    found = validate_pairs(pairs, scorer(MEMBERS[:1]).score(pair_items(pairs)))
    assert found.length_correlation.mean == pytest.approx(1.0)


def test_pairs_with_an_abstention_are_left_out():
    pairs = [pair("p", 1, 2), pair("q", 1, 2)]
    found = validate_pairs(pairs, [1.0, 5.0, None, 2.0])
    assert (found.num, found.num_abstained) == (1, 1)
    assert found.accuracy.mean == 1.0
    nothing = validate_pairs(pairs, [None, None, 0.0, 0.0])
    assert (nothing.num, nothing.num_abstained, nothing.accuracy) == (0, 2, None)


def test_the_items_of_pairs_are_what_the_policy_read_and_wrote():
    items = pair_items([pair("p", 2, 1)])
    assert [i.token_ids for i in items] == [[1, 5, 5], [1, 6]]
    assert [i.response for i in items] == ["good", "bad"]
