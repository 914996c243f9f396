"""Stage refresh: r -> r^, the reward model made to fit what the policy says now, without a new label (RLP, Sec. 4)."""

from dataclasses import replace

from rayrl.data.blocks import BlockTable
from rayrl.fleets.services import Services
from rayrl.records import Checkpoint
from rayrl.runs.run import Run
from rayrl.stages.artifacts import Pool, Preferences, Responses
from rayrl.stages.reward_model.fit_reward_model import fit_reward_model
from rayrl.stages.reward_model.importance import importance_weights
from rayrl.stages.rewards.reward_models import RewardModels
from rayrl.stages.sampling.generate import generate
from rayrl.stages.synthesis.synthesize import self_judge, synthesize_preferences

STAGE = "refit_reward_model"


def refresh(
    run: Run,
    services: Services,
    m1: Checkpoint,
    policy: Checkpoint,
    preferences: Preferences,
    r: RewardModels,
    pool: Pool,
) -> RewardModels:
    """r^ by `refresh.method`; "none" is the old r, the control of a second PPO on it.

    Args:
        run: the run.
        services: fleets.
        m1: where every reward model starts.
        policy: pi, trained with r; its samples are what r^ must fit.
        preferences: D.
        r: what pi was trained with.
        pool: the prompts U.
    """
    method = run.config.refresh.method
    if method == "none":
        return r
    if method == "ocrm":
        weights = importance_weights(run, services, m1, policy, preferences)
        return fit_reward_model(run, services, m1, [preferences], stage=STAGE, weights=weights)
    samples = sample_policy(run, services, policy, pool)
    if method == "uml":
        return fit_reward_model(run, services, m1, [preferences], stage=STAGE, views=samples)
    judge = self_judge(run, policy) if method == "self_judged" else r
    synthetic = synthesize_preferences(run, services, m1, judge, samples)
    return fit_reward_model(run, services, m1, [preferences, synthetic], stage=STAGE)


def sample_policy(run: Run, services: Services, policy: Checkpoint, pool: Pool) -> Responses:
    """Y: n samples of pi for every unlabelled prompt."""
    config = run.config
    sampling = config.generate.model_copy(
        update={"k": config.refresh.n, "temperature": config.refresh.temperature, "top_p": 1.0}
    )
    wanted = config.refresh.num_prompts or pool.num_prompts
    num_blocks = min(pool.train.num_blocks, -(-wanted // config.generate.block_size))
    part = replace(pool, key=f"{pool.key}-{num_blocks}", train=BlockTable(pool.train.url, num_blocks))
    return generate(run, services, policy, part, stage="samples", config=sampling)
