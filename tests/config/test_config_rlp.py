"""Settings of the second pipeline that mean nothing, alone or together, are refused; those at the edge are not."""

import pytest

from rayrl.config import load_config
from tests.config.test_config import SMALL, refusal


@pytest.fixture
def small(tmp_path):
    path = tmp_path / "small.toml"
    path.write_text(SMALL)
    return path


RLP = ['pipeline="rlp"', 'preferences={source="oracle"}']


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (['pipeline="rlp"'], "preferences is missing: the reward model learns from pairs"),
        ([RLP[0], "preferences={}"], "preferences.data is missing: name a file of pairs"),
        ([*RLP, "select.budget=1"], 'select.budget must be at least 2 when preferences.source is "oracle", got 1'),
        ([*RLP, "labels=direct"], 'labels must be "proxy" when pipeline is "rlp", got "direct"'),
        ([*RLP, "labels=expert"], 'labels must be "proxy" when pipeline is "rlp", got "expert"'),
        ([*RLP, "labels=shuffled"], 'ppo.reward is "reward_model"; leave labels out'),
        ([*RLP, "labels=shuffled", "ppo={reward='function', function='a:b'}"], 'ppo.reward is "function"'),
        ([*RLP, "generate.source=seed", "seed_data.path=x"], 'generate.source must be "policy" when preferences'),
        ([*RLP, 'evaluate.lm_eval.tasks=["mmlu"]'], "evaluate.lm_eval.tasks must be empty"),
        (["ppo.reward=function"], 'ppo.function and ppo.reward = "function" go together'),
        (["ppo.function=a:b"], 'ppo.function and ppo.reward = "function" go together'),
        (["ppo.function=reward", "ppo.reward=function"], "ppo.function: string should match pattern"),
        (["ppo.batch_size=513"], "ppo.batch_size must be at most ppo.rollout_size (512), got 513"),
        (["ppo.kl_coef=-0.1"], "ppo.kl_coef: input should be greater than or equal to 0"),
        (["ppo.kl_estimator=k4"], 'ppo.kl_estimator: must be one of "k1", "k2", "k3", "clamped", got "k4"'),
        (["ppo.target_kl=0"], "ppo.target_kl: input should be greater than 0"),
        (["ppo.max_kl=0"], "ppo.max_kl: input should be greater than 0"),
        (["ppo.clip_range=0"], "ppo.clip_range: input should be greater than 0"),
        (["ppo.clip_range=1"], "ppo.clip_range: input should be less than 1"),
        (["ppo.value_clip_range=0"], "ppo.value_clip_range: input should be greater than 0"),
        (["ppo.gamma=1.1"], "ppo.gamma: input should be less than or equal to 1"),
        (["ppo.gae_lambda=-0.1"], "ppo.gae_lambda: input should be greater than or equal to 0"),
        (["refresh.n=1"], "refresh.n: input should be greater than or equal to 2, got 1"),
        (["refresh.spg.gamma=-0.1"], "refresh.spg.gamma: input should be greater than or equal to 0"),
        (["refresh.spg.gamma=1.1"], "refresh.spg.gamma: input should be less than or equal to 1"),
        (["refresh.spg.threshold=-1"], "refresh.spg.threshold: input should be greater than -1"),
        (["evaluate.diagnosis_budget=35"], "evaluate.diagnosis_budget must be 0 or at least 36"),
        (["evaluate.best_of_n=1"], "evaluate.best_of_n must be 0 or at least 2, got 1"),
    ],
)
def test_settings_of_the_second_pipeline_are_refused(small, overrides, message):
    assert message in refusal(small, *overrides)


@pytest.mark.parametrize(
    "overrides",
    [
        RLP,
        ['pipeline="rlp"', "ppo.reward=evaluator", "labels=shuffled"],
        ['pipeline="rlp"', "ppo.reward=evaluator", "generate.source=seed", "seed_data.path=x"],
        [*RLP, "evaluate.diagnosis_budget=36", "evaluate.best_of_n=2", "refresh.spg.gamma=0", "refresh.n=2"],
        [*RLP, "ppo.gamma=1", "ppo.gae_lambda=0", "ppo.kl_coef=0", "ppo.batch_size=512"],
    ],
)
def test_what_stands_at_their_edges_is_accepted(small, overrides):
    assert load_config(small, overrides).pipeline == "rlp"


@pytest.mark.parametrize(("pipeline", "best_of_n"), [(RLP, 4), ([], 0)])
def test_best_of_n_is_a_control_of_rlp_alone(small, pipeline, best_of_n):
    assert load_config(small, [*pipeline, "evaluate.best_of_n=4"]).best_of_n == best_of_n
