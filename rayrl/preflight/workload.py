"""Workload of a run: how many responses it samples, queries it pays for and pairs it makes.

Budgets that the pool cannot fill are refused here. PPO's own rollouts are not counted.
"""

import math
from dataclasses import dataclass

from rayrl.algorithms.budget import planned_spending
from rayrl.algorithms.comparisons import num_disjoint, queries_per_pair, queries_per_prompt
from rayrl.algorithms.pairing import num_pairs_planned
from rayrl.config import PanelOracleConfig, RunConfig
from rayrl.errors import ConfigError
from rayrl.runs.stage_table import (
    GENERATE,
    PPO,
    PPO_REFRESHED,
    PSEUDO_LABEL,
    SAMPLES,
    TRACK_REWARDS,
    num_refresh_blocks,
    stages_of,
)


@dataclass(frozen=True, kw_only=True)
class Workload:
    """At most so many of each, over all rounds."""

    num_prompts: int
    """That train; the held-out ones come on top."""
    num_responses: int
    label_queries: tuple[int, ...]
    """Of each round; empty if the oracle labels nothing."""
    num_judged_prompts: int
    """Held-out prompts on which every policy is judged."""
    num_eval_queries: int
    """For those, and for the diagnosis."""
    num_eval_comparisons: int
    """Of those: with reference answers."""
    num_pairs: int

    @property
    def num_label_queries(self) -> int:
        return sum(self.label_queries)


def plan_workload(config: RunConfig, *, num_kept: int, num_seed: int, num_file_pairs: int) -> Workload:
    """Work out the workload of a run.

    Args:
        config: the run.
        num_kept: prompts of the pool, without empty ones and duplicates.
        num_seed: responses of the seed data.
        num_file_pairs: pairs of the preference file; 0 without one.

    Raises:
        ConfigError: the budget is larger than what can be asked about.
    """
    k = config.generate.k
    num_prompts = num_kept - config.pool.num_eval
    num_sampled = num_prompts * k if GENERATE.occurs(config, 1) else 0
    num_askable = num_seed if config.generate.source == "seed" else num_sampled
    if config.learns_from_judgements:
        _check_budget(config, num_prompts, num_seed)
    queries = label_queries(config, num_prompts=num_prompts, num_askable=num_askable)
    each = queries_per_eval_prompt(config)
    # Every policy on the same prompts: a prompt is judged whole or not at all.
    num_judged = min(config.pool.num_eval, config.evaluate.budget // each)
    # An oracle that cannot compare scores the reference instead: no query of those is a comparison.
    num_compared = each - num_policies(config) if config.competes_by in ("both", "random") else 0
    num_diagnosed = config.evaluate.diagnosis_budget if TRACK_REWARDS.occurs(config, 1) else 0
    return Workload(
        num_prompts=num_prompts,
        num_responses=(num_sampled + _num_refresh_samples(config, num_prompts)) * config.rounds,
        label_queries=queries,
        num_judged_prompts=num_judged,
        num_eval_queries=num_judged * each + num_diagnosed,
        num_eval_comparisons=num_judged * num_compared,
        num_pairs=_num_pairs(config, num_prompts, sum(queries), num_file_pairs),
    )


def label_queries(config: RunConfig, *, num_prompts: int, num_askable: int) -> tuple[int, ...]:
    """Paid queries of each round, if every one is answered; empty if the oracle labels nothing.

    Args:
        config: the run.
        num_prompts: each gives pairs to compare in a round.
        num_askable: responses of a round that can be judged.
    """
    budget = config.select.budget
    if config.asks_for_comparisons:
        assert config.preferences is not None, "the config is refused without preferences"
        unit = queries_per_pair(config.preferences.order)
        num_pairs = num_prompts * num_disjoint(config.generate.k, config.preferences.pairs_per_prompt)
        return planned_spending(budget, config.rounds, num_pairs * unit, unit)
    if not config.learns_from_judgements:
        return ()
    if config.labels == "expert":
        return (num_askable,)
    # The seed data's responses are asked about one by one: it has no k of them for a prompt.
    asks_whole_prompts = config.select.unit == "prompt" and config.generate.source != "seed"
    return planned_spending(budget, config.rounds, num_askable, config.generate.k if asks_whole_prompts else 1)


TEST_BUDGET = 60
"""Test questions of a run, over all its starts: at most three of either kind at each start that fails."""


def ledger_budgets(config: RunConfig, queries: tuple[int, ...]) -> dict[str, int]:
    """Caps of the ledger by purpose, given the label queries of every round."""
    return {
        "label": sum(queries),
        "evaluate": config.evaluate.budget + config.evaluate.diagnosis_budget,
        "test": TEST_BUDGET,
        **({"people": config.oracle.people_budget} if isinstance(config.oracle, PanelOracleConfig) else {}),
    }


def num_test_questions(config: RunConfig) -> int:
    """Count the kinds of question that the oracle is tried out with: a judgement, a comparison, or both."""
    if not config.oracle.is_tried_out:
        return 0
    return int(config.asks_for_judgements) + int(config.asks_to_compare)


def num_policies(config: RunConfig) -> int:
    """Policies that the oracle judges at the end: M1 and M2; in rlp M1, its best of n, and one for every PPO."""
    if config.pipeline == "proxy_dpo":
        return 2
    num_ppos = sum(stage in (PPO, PPO_REFRESHED) for stage, _ in stages_of(config))
    return 1 + bool(config.best_of_n) + num_ppos


def queries_per_eval_prompt(config: RunConfig) -> int:
    """Paid queries that judging all policies on one held-out prompt takes."""
    return queries_per_prompt(num_policies(config), config.competes_by)


def describe_rounds(config: RunConfig, queries: tuple[int, ...]) -> str:
    """Number of rounds, label queries of each, and the stages that each has; empty if there is one round."""
    if config.rounds == 1:
        return ""
    # The second round stands for all later ones.
    first_round = [stage for stage, number in stages_of(config) if number == 1]
    repeated: list[str] = []
    added: list[str] = []
    for stage, number in stages_of(config):
        if number == 2:
            names = repeated if stage in first_round else added
            names.append(stage.name)
    asked = " + ".join(f"{num:,}" for num in queries) or "no"
    later = f"; each after the first has {', '.join(added)} too" if added else ""
    return f"{config.rounds}, with {asked} label queries; each has {', '.join(repeated)}{later}"


def _check_budget(config: RunConfig, num_prompts: int, num_seed: int) -> None:
    """Refuse a budget for more judgements than there are responses. labels = "expert" pays for all, whatever it is."""
    k, budget = config.generate.k, config.select.budget
    num_responses = num_prompts * k * config.rounds
    asks_about_seed = config.generate.source == "seed"
    if config.labels == "expert" or budget <= (num_seed if asks_about_seed else num_responses):
        return
    if asks_about_seed:
        responses = f"{num_seed} responses of the seed data"
    else:
        times = f" x rounds = {config.rounds}" if config.rounds > 1 else ""
        responses = f"{num_responses} responses ({num_prompts} prompts x generate.k = {k}{times})"
    raise ConfigError(f"select.budget must be at most the {responses}, got {budget}; lower it, or add prompts")


def _num_refresh_samples(config: RunConfig, num_prompts: int) -> int:
    """Responses that the refresh samples in a round: n for each prompt of whole blocks."""
    if not SAMPLES.occurs(config, 1):
        return 0
    size = config.generate.block_size
    num_blocks = num_refresh_blocks(config.refresh.num_prompts, size, math.ceil(num_prompts / size))
    return min(num_prompts, num_blocks * size) * config.refresh.n


def _num_pairs(config: RunConfig, num_prompts: int, num_queries: int, num_file_pairs: int) -> int:
    """Pairs that DPO or the reward model learns from, before ties are dropped; 0 where PPO learns without pairs."""
    if PSEUDO_LABEL.occurs(config, 1):
        # labels = "direct" pairs the responses of the prompts whose k responses are all paid for.
        num_paired = num_queries // config.generate.k if config.labels == "direct" else num_prompts
        return num_pairs_planned(config.pseudo_label.pairing, num_paired, config.generate.k) * config.rounds
    if not config.learns_from_comparisons:
        return 0
    if config.asks_for_comparisons:
        assert config.preferences is not None, "the config is refused without preferences"
        return num_queries // queries_per_pair(config.preferences.order)
    return num_file_pairs
