"""Cost-effective proxy reward with on-policy and active learning (arXiv 2407.02119), one call per line of the paper."""

from ray.actor import ActorHandle

from rayrl.actors.services import Services
from rayrl.runs.run import Manifest, Run
from rayrl.stages.candidates import candidates
from rayrl.stages.dpo import dpo
from rayrl.stages.evaluate import evaluate
from rayrl.stages.fit_evaluator import fit_evaluator
from rayrl.stages.generate import generate
from rayrl.stages.pool import read_pool
from rayrl.stages.pseudo_label import pseudo_label
from rayrl.stages.query import query
from rayrl.stages.select import select
from rayrl.stages.sft import sft


def proxy_dpo(run: Run, services: Services, oracle: ActorHandle) -> Manifest:
    """Align the policy with what `select.budget` expert queries can teach; returns the evaluation."""
    pool = read_pool(run)  # X
    m1 = sft(run, services)  # M1 = SFT(M0, seed)
    services.warm(m1)
    responses = generate(run, services, m1, pool)  # Y ~ M1(. | X)
    query_set = select(run, services, m1, candidates(run, responses))  # Q, the coreset of Y
    judgements = query(run, oracle, query_set)  # E = expert(Q); costs budget
    evaluator = fit_evaluator(run, services, m1, judgements)  # M_eval = fit(M1, E)
    pairs = pseudo_label(run, services, m1, evaluator, responses, judgements)  # P = M_eval(Y), best against worst
    m2 = dpo(run, services, m1, pairs)  # M2 = DPO(M1, P)
    return evaluate(run, services, oracle, pool, m1=m1, m2=m2, evaluator=evaluator)
