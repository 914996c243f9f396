"""Methods of the refresh: one for each value of the setting, and what it fits r^ on beside D."""

from typing import get_args

import pytest

from rayrl.config import RefreshConfig, RunConfig
from rayrl.records import Checkpoint
from rayrl.runs.run import Run
from rayrl.stages.reward_model.refresh import METHODS, Refresh
from rayrl.stages.rewards.evaluator import GenerativeEvaluator

M1, PI = Checkpoint(path="m1", version="m1"), Checkpoint(path="pi", version="pi")


class Recorded(Refresh):
    """Inputs whose stages only name what they would make."""

    def samples(self):
        return "Y"

    def synthetic(self, reward):
        return "D^", reward

    def weights(self):
        return "w"

    def fit(self, *synthetic, views=None, weights=None):
        return [*synthetic, views, weights]


@pytest.fixture
def given(tmp_path):
    config = {
        "name": "refresh",
        "run_dir": str(tmp_path),
        "pipeline": "rlp",
        "policy": {"path": "model"},
        "pool": {"path": "prompts.jsonl"},
        "sft": {"enabled": False},
        "oracle": {"type": "scripted", "function": "a:b"},
        "preferences": {"data": {"path": "pairs.jsonl"}},
        "evaluator": {"type": "scalar"},
    }
    run = Run(config=RunConfig.model_validate(config), url=str(tmp_path))
    return Recorded(run=run, services=None, m1=M1, policy=PI, preferences=None, r="r", pool=None)  # type: ignore[arg-type]


def test_every_value_of_the_setting_is_a_method():
    assert set(METHODS) == set(get_args(RefreshConfig.model_fields["method"].annotation))


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        ("spg", [("D^", "r"), None, None]),
        ("reward_pairs", [("D^", "r"), None, None]),
        ("uml", ["Y", None]),
        ("ocrm", [None, "w"]),
        ("none", "r"),
    ],
)
def test_a_method_adds_its_own_to_d(given, method, expected):
    assert METHODS[method](given) == expected


def test_a_policy_that_judges_itself_is_a_generative_evaluator(given):
    ((name, judge), views, weights) = METHODS["self_judged"](given)
    assert (name, views, weights) == ("D^", None, None)
    assert isinstance(judge, GenerativeEvaluator)
    assert judge.checkpoint == judge.m1 == PI
