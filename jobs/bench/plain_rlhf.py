"""Plain RLHF: the second pipeline's stages up to its first PPO, for benchmarks and rows of studies."""

from dataclasses import dataclass

from ray.actor import ActorHandle

from rayrl.fleets.services import Services
from rayrl.pipelines.rlp import gather_preferences
from rayrl.records import Checkpoint
from rayrl.runs.run import Manifest, Run
from rayrl.runs.stage_metrics import M1, EvaluateMetrics
from rayrl.stages.artifacts import Pool
from rayrl.stages.evaluation.evaluate import evaluate
from rayrl.stages.policy.ppo import ppo
from rayrl.stages.policy.sft import sft
from rayrl.stages.reward_model.fit_reward_model import fit_reward_model
from rayrl.stages.rewards.reward_models import RewardModels
from rayrl.stages.sampling.pool import read_pool


@dataclass(frozen=True, kw_only=True)
class PlainRlhf:
    """Results of plain RLHF."""

    pool: Pool
    m1: Checkpoint
    r: RewardModels
    policy: Checkpoint
    """pi."""


def plain_rlhf(run: Run, services: Services, oracle: ActorHandle) -> PlainRlhf:
    """Run PPO of M1 with r, and the stages before it; stages and keys are those of `rlp`."""
    pool = read_pool(run)
    m1 = sft(run, services)
    preferences = gather_preferences(run, services, oracle, m1, pool, None)
    r = fit_reward_model(run, services, m1, [preferences])
    return PlainRlhf(pool=pool, m1=m1, r=r, policy=ppo(run, services, m1, r, pool))


def first_ppo_only(run: Run, services: Services, oracle: ActorHandle) -> Manifest[EvaluateMetrics]:
    """Run plain RLHF and its evaluation: for variants that change the first reward, without a refresh."""
    done = plain_rlhf(run, services, oracle)
    policies = {M1: done.m1, "ppo": done.policy}
    return evaluate(run, services, oracle, done.pool, policies, {"r": done.r})
