"""Cost of a run's paid queries, before any is asked."""

from dataclasses import dataclass

from rayrl.config import OracleBase, PanelOracleConfig, RunConfig
from rayrl.models.judge_prompt import Rubric, oracle_prompt
from rayrl.models.pairwise_prompt import pairwise_prompt
from rayrl.preflight.inputs import PoolFacts, count_tokens
from rayrl.preflight.model import ModelFacts
from rayrl.preflight.workload import Workload


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Price of all queries, if prompts are of average length, and responses and answers as long as allowed."""

    label_usd: float
    evaluate_usd: float
    people_usd: float = 0.0
    """Of people beside judges."""

    @property
    def total_usd(self) -> float:
        return self.label_usd + self.evaluate_usd + self.people_usd


def estimate_cost(
    config: RunConfig, rubric: Rubric, pool: PoolFacts, model: ModelFacts, workload: Workload
) -> Cost | None:
    """Price the queries; None for an oracle without prices."""
    prices = config.oracle.prices()
    if prices is None:
        return None

    def price(question: str, num_responses: int) -> float:
        # The policy's tokenizer stands for the oracle's, which is not known here.
        num_asked = count_tokens(config, model, [question])[0]
        num_input = num_asked + pool.mean_tokens + num_responses * config.generate.max_tokens
        return prices.bound_usd(num_input)

    judgement = price(oracle_prompt(rubric, "", ""), 1)
    comparison = price(pairwise_prompt(rubric, "", "", ""), 2)
    # A run labels by judgements or by comparisons; its evaluation may pay for both.
    label = comparison if config.asks_for_comparisons else judgement
    num_comparisons = workload.num_eval_comparisons
    num_judgements = workload.num_eval_queries - num_comparisons
    return Cost(
        label_usd=label * workload.num_label_queries,
        evaluate_usd=judgement * num_judgements + comparison * num_comparisons,
        people_usd=_people_usd(config.oracle),
    )


def _people_usd(oracle: OracleBase) -> float:
    if not isinstance(oracle, PanelOracleConfig) or oracle.people is None:
        return 0.0
    prices = oracle.people.prices()
    return 0.0 if prices is None else oracle.people_budget * prices.bound_usd(0)
