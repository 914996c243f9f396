"""Reward learning on policy (arXiv 2403.19279), one call per line of the paper; and PPO on other rewards beside it."""

from ray.actor import ActorHandle

from rayrl.actors.services import Services
from rayrl.data.tokenizing import context_length
from rayrl.models.rewards import Rewards
from rayrl.records import Checkpoint
from rayrl.runs.run import Manifest, Run
from rayrl.stages.audit_pairs import audit_pairs
from rayrl.stages.candidates import candidates
from rayrl.stages.evaluate_policies import evaluate_policies
from rayrl.stages.fit_evaluator import fit_evaluator
from rayrl.stages.fit_reward_model import fit_reward_model
from rayrl.stages.generate import generate
from rayrl.stages.pool import Pool, read_pool
from rayrl.stages.ppo import FunctionReward, ppo
from rayrl.stages.preferences import gather_preferences
from rayrl.stages.query import query
from rayrl.stages.refresh import refresh
from rayrl.stages.reward import make_reward_scorer
from rayrl.stages.score import make_scorer
from rayrl.stages.select import select
from rayrl.stages.sft import sft
from rayrl.stages.track_rewards import track_rewards


def rlp(run: Run, services: Services, oracle: ActorHandle) -> Manifest:
    """Align the policy by PPO, refresh the reward model on the policy's own samples, and align again from M1."""
    pool = read_pool(run)  # U
    m1 = sft(run, services)  # pi_SFT
    if run.config.ppo.reward != "reward_model":
        return ppo_alone(run, services, oracle, m1, pool)
    preferences = gather_preferences(run, services, oracle, m1, pool)  # D
    r = fit_reward_model(run, services, m1, [preferences])  # r, Bradley-Terry on D
    reward = make_reward_scorer(run, services, m1, r)
    pi = ppo(run, services, m1, reward, r.key, pool)  # pi = PPO(pi_SFT, r)
    refreshed = refresh(run, services, m1, pi, preferences, (r, reward, pool))  # r^ on D and pi's samples
    new_reward = make_reward_scorer(run, services, m1, refreshed)
    aligned = ppo(run, services, m1, new_reward, refreshed.key, pool, "ppo_refreshed")  # pi^ = PPO(pi_SFT, r^)
    policies = {"m1": m1, "ppo": pi, "rlp": aligned}
    rewards: dict[str, Rewards] = {"r": reward, "refreshed": new_reward}
    track_rewards(run, oracle, {"ppo": pi, "ppo_refreshed": aligned}, rewards)  # does r degrade? does r^ repair it?
    audit_pairs(run, oracle)  # gamma against the quality of the synthetic pairs
    return evaluate_policies(run, services, oracle, pool, policies, rewards)


def ppo_alone(run: Run, services: Services, oracle: ActorHandle, m1: Checkpoint, pool: Pool) -> Manifest:
    """PPO on a Python function, or on an evaluator that learnt from actively selected labels (arXiv 2407.02119)."""
    function = run.config.ppo.function
    rewards: Rewards
    if function is not None:
        rewards = FunctionReward(function)
        key = rewards.key
    else:
        responses = generate(run, services, m1, pool)  # Y ~ M1
        query_set = select(run, services, m1, candidates(run, responses))  # Q
        evaluator = fit_evaluator(run, services, m1, query(run, oracle, query_set))  # M_eval; costs budget
        assert evaluator is not None, 'labels = "direct" and "expert" fit no evaluator, and are refused'
        rewards = make_scorer(run, services, m1, evaluator, context_length(run.config.policy))
        key = evaluator.version
    pi = ppo(run, services, m1, rewards, key, pool)
    return evaluate_policies(run, services, oracle, pool, {"m1": m1, "ppo": pi}, {"reward": rewards})
