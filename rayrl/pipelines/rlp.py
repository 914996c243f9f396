"""Reward learning on policy (arXiv 2403.19279), one call per line of the paper; and PPO on other rewards beside it."""

from ray.actor import ActorHandle

from rayrl.fleets.services import Services
from rayrl.records import Checkpoint
from rayrl.runs.run import Manifest, Run, round_name
from rayrl.runs.stage_metrics import M1, EvaluateMetrics
from rayrl.runs.stage_table import PPO, PPO_REFRESHED
from rayrl.stages.artifacts import Judgements, Pool, Preferences
from rayrl.stages.evaluation.audit_pairs import audit_pairs
from rayrl.stages.evaluation.evaluate import evaluate
from rayrl.stages.evaluation.track_rewards import track_rewards
from rayrl.stages.labelling.comparisons import asking_pairs, compare
from rayrl.stages.labelling.preferences import read_preferences
from rayrl.stages.labelling.query import asking, query
from rayrl.stages.policy.ppo import ppo
from rayrl.stages.policy.sft import sft
from rayrl.stages.proxy.fit_evaluator import fit_evaluator
from rayrl.stages.reward_model.fit_reward_model import fit_reward_model
from rayrl.stages.reward_model.refresh import refresh
from rayrl.stages.rewards.function import FunctionReward
from rayrl.stages.rewards.protocol import Reward
from rayrl.stages.rewards.reward_models import RewardModels
from rayrl.stages.sampling.generate import generate
from rayrl.stages.sampling.pool import read_pool
from rayrl.stages.selection.candidates import candidates
from rayrl.stages.selection.select import select


def rlp(run: Run, services: Services, oracle: ActorHandle) -> Manifest[EvaluateMetrics]:
    """Align the policy by PPO, refresh the reward model on the policy's own samples, and align again from M1.

    Further rounds (ours): with preferences of the oracle, D grows by comparisons of the last policy's responses, and
    all is done again on it; with preferences of a file, the refresh and the PPO after it are. Every fit and every PPO
    starts at M1, and r^ learns from the synthetic pairs of its own round only.
    """
    pool = read_pool(run)  # U
    m1 = policy = sft(run, services)  # pi_SFT
    match run.config.ppo.reward:
        case "function":
            return ppo_on_function(run, services, oracle, m1, pool)
        case "evaluator":
            return ppo_on_evaluator(run, services, oracle, m1, pool)
    policies: dict[str, Checkpoint] = {M1: m1}
    rewards: dict[str, Reward] = {}
    preferences: Preferences | None = None
    r: RewardModels | None = None
    for now in run.rounds():
        # Only the oracle has more preferences to give in a later round.
        if preferences is None or r is None or run.config.asks_for_comparisons:
            preferences = gather_preferences(now, services, oracle, policy, pool, preferences)  # D
            r = fit_reward_model(now, services, m1, [preferences])  # r, Bradley-Terry on D
            policy = ppo(now, services, m1, r, pool)  # pi = PPO(pi_SFT, r)
            policies[round_name("ppo", now.round)], rewards[round_name("r", now.round)] = policy, r
        r = refresh(now, services, m1, policy, preferences, r, pool)  # r^ on D and pi's samples
        policy = ppo(now, services, m1, r, pool, PPO_REFRESHED)  # pi^ = PPO(pi_SFT, r^)
        policies[round_name("rlp", now.round)], rewards[round_name("refreshed", now.round)] = policy, r
        # What the paper leaves open is measured on the paper's own round.
        if now.round == 1:
            ppos = {PPO: policies["ppo"], PPO_REFRESHED: policy}
            track_rewards(now, services, oracle, ppos, rewards)  # does r degrade? does r^ repair it?
            audit_pairs(now, oracle)  # gamma against the quality of the synthetic pairs
    return evaluate(run, services, oracle, pool, policies, rewards)


def gather_preferences(
    run: Run, services: Services, oracle: ActorHandle, policy: Checkpoint, pool: Pool, earlier: Preferences | None
) -> Preferences:
    """D: the pairs of a file, or the oracle's comparisons of the policy's responses, with those of earlier rounds."""
    if not run.config.asks_for_comparisons:
        return read_preferences(run)
    responses = generate(run, services, policy, pool)  # Y ~ pi_SFT
    # The prompts whose responses are compared, or the pairs.
    query_set = select(run, services, policy, responses, asking_pairs(run, oracle))
    return compare(run, oracle, responses, query_set, earlier)  # costs budget


def ppo_on_function(
    run: Run, services: Services, oracle: ActorHandle, m1: Checkpoint, pool: Pool
) -> Manifest[EvaluateMetrics]:
    """PPO on a Python function; nothing is labelled."""
    config = run.config.ppo
    assert config.function is not None, "the config is refused without a function"
    reward = FunctionReward(
        path=config.function, timeout_s=config.function_timeout_s, concurrency=config.function_concurrency
    )
    pi = ppo(run, services, m1, reward, pool)
    return evaluate(run, services, oracle, pool, {M1: m1, "ppo": pi}, {"reward": reward})


def ppo_on_evaluator(
    run: Run, services: Services, oracle: ActorHandle, m1: Checkpoint, pool: Pool
) -> Manifest[EvaluateMetrics]:
    """PPO on an evaluator that learnt from actively selected labels (arXiv 2407.02119).

    A further round asks about the last policy's responses, fits the evaluator on all judgements so far, and starts both
    the fit and PPO at M1.
    """
    policy = m1
    policies: dict[str, Checkpoint] = {M1: m1}
    rewards: dict[str, Reward] = {}
    judgements: list[Judgements] = []
    evaluator = None
    for now in run.rounds():
        responses = generate(now, services, policy, pool)  # Y ~ M1
        unlabelled = candidates(now, responses, judgements)
        query_set = select(now, services, policy, unlabelled, asking(oracle), evaluator)  # Q
        judgements.append(query(now, oracle, query_set))  # E; costs budget
        evaluator = fit_evaluator(now, services, m1, judgements)  # M_eval
        assert evaluator is not None, 'labels = "direct" and "expert" fit no evaluator, and are refused'
        policy = ppo(now, services, m1, evaluator, pool)
        policies[round_name("ppo", now.round)], rewards[round_name("reward", now.round)] = policy, evaluator
    return evaluate(run, services, oracle, pool, policies, rewards)
