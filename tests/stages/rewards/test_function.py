"""A user's Python function as a reward."""

import pytest

from rayrl.errors import ConfigError
from rayrl.records import Scored
from rayrl.stages.rewards.function import FunctionReward


def test_a_python_function_rewards_abstains_and_is_found_or_refused():
    rewards = FunctionReward("tests.oracles.length_oracle:reward")
    said = [Scored(prompt="?", response=text, token_ids=[1]) for text in ("four", "")]
    assert rewards.score(said) == [0.04, None]
    assert rewards.key != FunctionReward("tests.oracles.length_oracle:judge").key
    with pytest.raises(ConfigError, match="has no function nobody"):
        FunctionReward("tests.oracles.length_oracle:nobody").score(said)
    with pytest.raises(ConfigError, match=r"must be written in Python.*call it from a function of your own"):
        _ = FunctionReward("math:dist").key
