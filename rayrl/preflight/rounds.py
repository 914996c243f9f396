"""What the rounds of a run repeat, what each asks, and how many policies that leaves to judge."""

from rayrl.algorithms.budget import planned_spending
from rayrl.algorithms.comparisons import num_disjoint, queries_per_pair
from rayrl.config import RunConfig
from rayrl.preflight.plan import StagePlan

ONCE = ("sft", "evaluate", "report")
REFRESHED = ("synthesize", "refresh", "ppo_refreshed")


def label_queries(config: RunConfig, num_prompts: int, num_askable: int) -> tuple[int, ...]:
    """Paid queries of each round, if every one is answered; empty if nothing is asked.

    Args:
        config: the run.
        num_prompts: each gives pairs to compare in a round.
        num_askable: responses of a round that can be judged.
    """
    budget, select = config.select.budget, config.select
    if config.asks_for_comparisons:
        assert config.preferences is not None
        unit = queries_per_pair(config.preferences.order)
        num_pairs = num_prompts * num_disjoint(config.generate.k, config.preferences.pairs_per_prompt)
        return planned_spending(budget, config.rounds, num_pairs * unit, unit)
    if config.pipeline == "rlp" and config.ppo.reward != "evaluator":
        return ()
    if config.labels == "expert":
        return (num_askable,)
    is_whole = select.unit == "prompt" and config.generate.source != "seed"
    return planned_spending(budget, config.rounds, num_askable, config.generate.k if is_whole else 1)


def num_policies(config: RunConfig) -> int:
    """What the expert judges at the end: M1 and M2; or M1, its best of n, and every policy that rounds of rlp make."""
    if config.pipeline == "proxy_dpo":
        return 2
    num_bases = 1 + bool(config.evaluate.best_of_n)
    if config.ppo.reward != "reward_model":
        return num_bases + config.rounds
    return num_bases + (2 * config.rounds if config.asks_for_comparisons else 1 + config.rounds)


def describe_rounds(config: RunConfig, stages: tuple[StagePlan, ...], queries: tuple[int, ...]) -> str:
    """How many rounds there are, what each asks, and the stages that each has; empty if there is one."""
    if config.rounds == 1:
        return ""
    names = [stage.name for stage in stages if stage.name not in ONCE]
    if config.pipeline == "rlp" and config.ppo.reward == "reward_model" and not config.asks_for_comparisons:
        names = [name for name in names if name in REFRESHED]  # a file has no more to give
    asked = " + ".join(f"{num:,}" for num in queries) or "no"
    return f"{config.rounds}, with {asked} label queries; each has {', '.join(names)}"
