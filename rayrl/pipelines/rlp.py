"""Reward learning on policy (arXiv 2403.19279), one call per line of the paper."""

from ray.actor import ActorHandle

from rayrl.actors.services import Services
from rayrl.runs.run import Manifest, Run
from rayrl.stages.evaluate_policies import evaluate_policies
from rayrl.stages.fit_reward_model import fit_reward_model
from rayrl.stages.pool import read_pool
from rayrl.stages.ppo import ppo
from rayrl.stages.preferences import gather_preferences
from rayrl.stages.refresh import refresh
from rayrl.stages.reward import make_reward_scorer
from rayrl.stages.sft import sft


def rlp(run: Run, services: Services, oracle: ActorHandle) -> Manifest:
    """Align the policy by PPO, refresh the reward model on the policy's own samples, and align again from M1."""
    pool = read_pool(run)  # U
    m1 = sft(run, services)  # pi_SFT
    preferences = gather_preferences(run, services, oracle, m1, pool)  # D
    r = fit_reward_model(run, services, m1, [preferences])  # r, Bradley-Terry on D
    reward = make_reward_scorer(run, services, m1, r)
    pi = ppo(run, services, m1, reward, r.key, pool)  # pi = PPO(pi_SFT, r)
    refreshed = refresh(run, services, m1, pi, preferences, (r, reward, pool))  # r^ on D and pi's samples
    new_reward = make_reward_scorer(run, services, m1, refreshed)
    aligned = ppo(run, services, m1, new_reward, refreshed.key, pool, "ppo_refreshed")  # pi^ = PPO(pi_SFT, r^)
    return evaluate_policies(
        run,
        services,
        oracle,
        pool,
        {"m1": m1, "ppo": pi, "rlp": aligned},
        {"r": reward, "refreshed": new_reward},
    )
