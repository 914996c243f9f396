"""A user's Python function as a reward."""

import asyncio

import pytest

from rayrl.errors import ConfigError, RewardFailed
from rayrl.records import Scored
from rayrl.stages.rewards.function import FunctionReward
from tests.stages.rewards import reward_functions


def reward(path, *, timeout_s=60.0, concurrency=4):
    return FunctionReward(path=path, timeout_s=timeout_s, concurrency=concurrency)


def own(name, **settings):
    return reward(f"{reward_functions.__name__}:{name}", **settings)


def said(*texts):
    return [Scored(prompt="?", response=text, token_ids=[1]) for text in texts]


def test_a_python_function_rewards_abstains_and_is_found_or_refused():
    rewards = reward("tests.oracles.length_oracle:reward")
    assert rewards.score(said("four", "")) == [0.04, None] and rewards.score([]) == []
    assert rewards.key != reward("tests.oracles.length_oracle:judge").key
    assert rewards.key == reward("tests.oracles.length_oracle:reward", timeout_s=1.0, concurrency=1).key
    with pytest.raises(ConfigError, match="has no function nobody"):
        reward("tests.oracles.length_oracle:nobody").score(said("four"))
    with pytest.raises(ConfigError, match=r"must be written in Python.*call it from a function of your own"):
        _ = reward("math:dist").key


def test_calls_run_side_by_side_and_keep_their_order():
    """One after another, each call would wait for the three others until it fails."""
    texts = ["a", "bb", "ccc", "dddd"]
    assert own("meet").score(said(*texts)) == [1.0, 2.0, 3.0, 4.0]


@pytest.mark.parametrize("name", ["hang_on_slow", "hang_on_slow_async"])
def test_a_call_that_hangs_abstains_with_its_reason_and_holds_up_no_other(name):
    reasons = {}
    rewards = own(name, timeout_s=0.3, concurrency=1)
    try:
        assert rewards.score(said("slow", "fast", "slow", ""), reasons) == [None, 1.0, None, None]
    finally:
        reward_functions.RELEASE.set()
        reward_functions.RELEASE.clear()
    assert reasons == {0: "timed_out", 2: "timed_out"}


def test_a_notebooks_event_loop_is_no_obstacle():
    async def inside_a_loop():
        return own("hang_on_slow_async").score(said("fast"))

    assert asyncio.run(inside_a_loop()) == [1.0]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "fail",
            r"ppo.function: fail\('\?', 'x'\) raised\n.*reward_functions.py.*\nLookupError: no such key: \?\nMend",
        ),
        ("fail_async", r"ppo.function: fail_async\('\?', 'x'\) raised\n.*\nLookupError: no such key: \?\nMend"),
        ("leave", r"leave\('\?', 'x'\) raised\n.*\nRuntimeError: SystemExit: 3\nMend"),
        ("speak", r"speak\('\?', 'x'\) must return a number, or None to abstain, got 'good'; Mend the function, and"),
    ],
)
def test_a_function_that_fails_stops_the_run_with_its_own_lines(name, message):
    with pytest.raises(RewardFailed, match=f"(?s){message}") as caught:
        own(name).score(said("x", "x"))
    assert "asyncio/runners.py" not in str(caught.value) and "rewards/function.py" not in str(caught.value)
