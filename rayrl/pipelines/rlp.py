"""Reward learning on policy (arXiv 2403.19279), one call per line of the paper; and PPO on other rewards beside it."""

from ray.actor import ActorHandle

from rayrl.fleets.services import Services
from rayrl.records import Checkpoint
from rayrl.runs.run import Manifest, Run, round_name
from rayrl.stages.artifacts import Judgements, Pool, Preferences
from rayrl.stages.evaluation.audit_pairs import audit_pairs
from rayrl.stages.evaluation.evaluate_policies import evaluate_policies
from rayrl.stages.evaluation.track_rewards import track_rewards
from rayrl.stages.labelling.preferences import gather_preferences
from rayrl.stages.labelling.query import query
from rayrl.stages.policy.ppo import FunctionReward, ppo
from rayrl.stages.policy.sft import sft
from rayrl.stages.proxy.fit_evaluator import fit_evaluator
from rayrl.stages.reward_model.fit_reward_model import fit_reward_model
from rayrl.stages.reward_model.refresh import refresh
from rayrl.stages.rewards.evaluator import Evaluator
from rayrl.stages.rewards.reward_models import Reward, RewardModels
from rayrl.stages.sampling.generate import generate
from rayrl.stages.sampling.pool import read_pool
from rayrl.stages.selection.candidates import candidates
from rayrl.stages.selection.select import select


def rlp(run: Run, services: Services, oracle: ActorHandle) -> Manifest:
    """Align the policy by PPO, refresh the reward model on the policy's own samples, and align again from M1.

    Further rounds (ours): with preferences of the expert, D grows by comparisons of the last policy's responses, and
    all is done again on it; with preferences of a file, the refresh and the PPO after it are. Every fit and every PPO
    starts at M1, and r^ learns from the synthetic pairs of its own round only.
    """
    pool = read_pool(run)  # U
    m1 = policy = sft(run, services)  # pi_SFT
    if run.config.ppo.reward != "reward_model":
        return ppo_alone(run, services, oracle, m1, pool)
    policies, rewards = {"m1": m1}, dict[str, Reward]()
    preferences: Preferences | None = None
    r: RewardModels | None = None
    for number, now in enumerate(run.rounds(), start=1):
        if preferences is None or r is None or asks_expert(run):
            preferences = gather_preferences(now, services, oracle, policy, pool, preferences)  # D
            r = fit_reward_model(now, services, m1, [preferences])  # r, Bradley-Terry on D
            policy = ppo(now, services, m1, r, pool)  # pi = PPO(pi_SFT, r)
            policies[round_name("ppo", number)], rewards[round_name("r", number)] = policy, r
        r = refresh(now, services, m1, policy, preferences, r, pool)  # r^ on D and pi's samples
        policy = ppo(now, services, m1, r, pool, "ppo_refreshed")  # pi^ = PPO(pi_SFT, r^)
        policies[round_name("rlp", number)], rewards[round_name("refreshed", number)] = policy, r
        if number == 1:  # what the paper leaves open is asked of the paper's own round
            ppos = {"ppo": policies["ppo"], "ppo_refreshed": policy}
            track_rewards(now, services, oracle, ppos, rewards)  # does r degrade? does r^ repair it?
            audit_pairs(now, oracle)  # gamma against the quality of the synthetic pairs
    return evaluate_policies(run, services, oracle, pool, policies, rewards)


def asks_expert(run: Run) -> bool:
    """Whether preferences are the expert's, so that a later round can have more of them."""
    return run.config.preferences is not None and run.config.preferences.source == "oracle"


def ppo_alone(run: Run, services: Services, oracle: ActorHandle, m1: Checkpoint, pool: Pool) -> Manifest:
    """PPO on a Python function, or on an evaluator that learnt from actively selected labels (arXiv 2407.02119).

    A further round asks about the last policy's responses, fits the evaluator on all judgements so far, and starts both
    the fit and PPO at M1.
    """
    function = run.config.ppo.function
    if function is not None:
        by_function = FunctionReward(function)
        pi = ppo(run, services, m1, by_function, pool)
        return evaluate_policies(run, services, oracle, pool, {"m1": m1, "ppo": pi}, {"reward": by_function})
    policy, policies, rewards = m1, {"m1": m1}, dict[str, Reward]()
    judgements: list[Judgements] = []
    for number, now in enumerate(run.rounds(), start=1):
        responses = generate(now, services, policy, pool)  # Y ~ M1
        query_set = select(now, services, policy, candidates(now, responses, judgements))  # Q
        judgements.append(query(now, oracle, query_set))  # E; costs budget
        evaluator = fit_evaluator(now, services, m1, judgements)  # M_eval
        assert evaluator is not None, 'labels = "direct" and "expert" fit no evaluator, and are refused'
        reward = Evaluator(checkpoint=evaluator, m1=m1, config=now.config)
        policy = ppo(now, services, m1, reward, pool)
        policies[round_name("ppo", number)], rewards[round_name("reward", number)] = policy, reward
    return evaluate_policies(run, services, oracle, pool, policies, rewards)
