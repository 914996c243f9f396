"""Settings of the second pipeline that mean nothing, alone or together, are refused; those at the edge are not."""

import pytest

from rayrl.config import load_config
from tests.config.test_config import SMALL, refusal


@pytest.fixture
def small(tmp_path):
    path = tmp_path / "small.toml"
    path.write_text(SMALL)
    return path


GROUPS = ["ppo.k=4", "ppo.advantages=group_normalised"]
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
        (["ppo.function=reward", "ppo.reward=function"], 'ppo.function: must be "module:function"'),
        (["ppo.batch_size=513"], "ppo.batch_size must be at most ppo.rollout_size (512), got 513"),
        (
            ["ppo.k=2", "ppo.batch_size=1025"],
            "ppo.batch_size must be at most ppo.rollout_size * ppo.k (1024), got 1025",
        ),
        (["ppo.k=0"], "ppo.k: must be above 0, got 0"),
        (
            ["ppo.k=2", "ppo.target_kl=1", "ppo.kl_horizon=1023"],
            "ppo.kl_horizon must be at least ppo.rollout_size * ppo",
        ),
        (["ppo.advantages=vtrace"], 'ppo.advantages: must be one of "gae", "rloo", "group_mean", "group_normalised"'),
        (["ppo.advantages=rloo"], 'ppo.k must be at least 2 when ppo.advantages is "rloo"'),
        (["ppo.advantages=group_mean"], 'ppo.k must be at least 2 when ppo.advantages is "group_mean"'),
        ([*GROUPS, "ppo.gamma=0.9"], 'ppo.gamma must be left out when ppo.advantages is "group_normalised"'),
        ([*GROUPS, "ppo.gae_lambda=0.9"], "ppo.gae_lambda must be left out when ppo.advantages"),
        ([*GROUPS, "ppo.value_coef=0.5"], "trains no value function, got 0.5; leave it out, or set ppo.advantages"),
        ([*GROUPS, "ppo.value_clip_range=0.5"], "ppo.value_clip_range must be left out when ppo.advantages"),
        ([*GROUPS, "ppo.value_learning_rate=1e-4"], "ppo.value_learning_rate must be left out when ppo.advantages"),
        ([*GROUPS, "ppo.value_warmup_steps=1"], "ppo.value_warmup_steps must be left out when ppo.advantages"),
        (["ppo.reward_clip=0"], "ppo.reward_clip: must be above 0"),
        (["ppo.clip_range_high=0"], "ppo.clip_range_high: must be above 0"),
        (["ppo.lora={}", "ppo.reference_offload=true"], "ppo.reference_offload must be false with ppo.lora"),
        (["ppo.kl_coef=-0.1"], "ppo.kl_coef: must be at least 0"),
        (["ppo.kl_estimator=k4"], 'ppo.kl_estimator: must be one of "k1", "k2", "k3", "clamped", got "k4"'),
        (["ppo.target_kl=0"], "ppo.target_kl: must be above 0"),
        (["ppo.max_kl=0"], "ppo.max_kl: must be above 0"),
        (["ppo.clip_range=0"], "ppo.clip_range: must be above 0"),
        (["ppo.clip_range=1"], "ppo.clip_range: must be below 1"),
        (["ppo.value_clip_range=0"], "ppo.value_clip_range: must be above 0"),
        (["ppo.gamma=1.1"], "ppo.gamma: must be at most 1"),
        (["ppo.gae_lambda=-0.1"], "ppo.gae_lambda: must be at least 0"),
        (["refresh.n=1"], "refresh.n: must be at least 2, got 1"),
        (["refresh.spg.gamma=-0.1"], "refresh.spg.gamma: must be at least 0"),
        (["refresh.spg.gamma=1.1"], "refresh.spg.gamma: must be at most 1"),
        (["refresh.spg.threshold=-1"], "refresh.spg.threshold: must be above -1"),
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
        [*RLP, "ppo.k=2", "ppo.advantages=rloo", "ppo.batch_size=1024", "ppo.value_coef=0.1", "ppo.clip_range_high=2"],
        [*RLP, "ppo.k=4", "ppo.value_learning_rate=1e-5", "ppo.value_warmup_steps=10", "ppo.reference_offload=true"],
    ],
)
def test_what_stands_at_their_edges_is_accepted(small, overrides):
    assert load_config(small, overrides).pipeline == "rlp"


@pytest.mark.parametrize(("pipeline", "best_of_n"), [(RLP, 4), ([], 0)])
def test_best_of_n_is_a_control_of_rlp_alone(small, pipeline, best_of_n):
    assert load_config(small, [*pipeline, "evaluate.best_of_n=4"]).best_of_n == best_of_n


def test_rollouts_are_counted_in_prompts_and_optimizer_steps_in_responses(small):
    ppo = load_config(small, ["ppo={rollout_size=100, k=4, batch_size=150, inner_epochs=2, epochs=3}"]).ppo
    assert ppo.responses_per_rollout == 400
    assert ppo.num_rollouts(250) == 9  # 100, 100 and 50 prompts, three times
    assert ppo.num_updates(250) == 9 * 2 * 3  # 150, 150 and 100 responses
    assert ppo.model_copy(update={"max_rollouts": 5}).num_updates(250) == 5 * 2 * 3


def test_a_resolved_config_without_a_value_function_is_accepted_again(small):
    """Run folders keep every setting with its value, defaults included."""
    config = load_config(small, [*RLP, *GROUPS])
    assert type(config.ppo).model_validate(config.ppo.model_dump(mode="json")) == config.ppo
