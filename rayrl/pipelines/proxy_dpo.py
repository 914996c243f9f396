"""Cost-effective proxy reward with on-policy and active learning (arXiv 2407.02119), one call per line of the paper."""

from ray.actor import ActorHandle

from rayrl.fleets.services import Services
from rayrl.runs.run import Manifest, Run
from rayrl.runs.stage_metrics import M1, EvaluateMetrics
from rayrl.stages.artifacts import Judgements
from rayrl.stages.evaluation.evaluate import evaluate
from rayrl.stages.labelling.query import asking, query
from rayrl.stages.policy.dpo import dpo
from rayrl.stages.policy.sft import sft
from rayrl.stages.proxy.fit_evaluator import fit_evaluator
from rayrl.stages.proxy.pseudo_label import pseudo_label
from rayrl.stages.sampling.generate import generate
from rayrl.stages.sampling.pool import read_pool
from rayrl.stages.selection.candidates import candidates
from rayrl.stages.selection.select import select


def proxy_dpo(run: Run, services: Services, oracle: ActorHandle) -> Manifest[EvaluateMetrics]:
    """Align the policy with what `select.budget` oracle queries can teach; returns the evaluation.

    Further rounds (ours) are iterative DPO: each samples the policy that the last one made, asks about what is new,
    fits the evaluator from M1 on all judgements so far, and starts DPO from that policy, with it as the reference.
    """
    pool = read_pool(run)  # X
    m1 = policy = sft(run, services)  # M1 = SFT(M0, seed)
    services.warm(m1)
    judgements: list[Judgements] = []
    evaluator = None
    for now in run.rounds():
        responses = generate(now, services, policy, pool)  # Y ~ M1(. | X)
        unlabelled = candidates(now, responses, judgements)
        query_set = select(now, services, policy, unlabelled, asking(oracle), evaluator)  # Q, the coreset of Y
        judgements.append(query(now, oracle, query_set))  # E = oracle(Q); costs budget
        evaluator = fit_evaluator(now, services, m1, judgements)  # M_eval = fit(M1, E)
        # P = M_eval(Y), best against worst
        pairs = pseudo_label(now, services, policy, evaluator, responses, judgements)
        policy = dpo(now, services, policy, pairs)  # M2 = DPO(M1, P)
    rewards = {"evaluator": evaluator} if evaluator is not None else {}
    return evaluate(run, services, oracle, pool, {M1: m1, "m2": policy}, rewards)
