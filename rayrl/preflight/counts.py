"""How much a run generates, asks, pays for and pairs; budgets the pool cannot fill are refused."""

from dataclasses import dataclass, replace

from rayrl.algorithms.comparisons import queries_per_pair, queries_per_prompt
from rayrl.config import RunConfig
from rayrl.errors import ConfigError
from rayrl.preflight.rounds import label_queries, num_policies


@dataclass(frozen=True, kw_only=True)
class Counts:
    """At most so many of each, over all rounds."""

    num_prompts: int
    num_responses: int
    label_queries: tuple[int, ...]
    """Of each round; empty if nothing is asked."""
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


def count_proxy_dpo(config: RunConfig, num_kept: int, num_seed: int) -> Counts:
    """What is judged and paired.

    Args:
        config: the run.
        num_kept: prompts of the pool.
        num_seed: responses of the seed data.

    Raises:
        ConfigError: the budget is larger than what can be asked about.
    """
    from rayrl.algorithms.pairing import num_pairs_planned

    k, budget = config.generate.k, config.select.budget
    num_prompts = _num_prompts(config, num_kept)
    num_responses = num_prompts * k * config.rounds
    num_askable = num_seed if config.generate.source == "seed" else num_responses
    if config.labels != "expert" and budget > num_askable:
        times = f" x rounds = {config.rounds}" if config.rounds > 1 else ""
        of_what = (
            f"{num_seed} responses of the seed data"
            if config.generate.source == "seed"
            else f"{num_responses} responses ({num_prompts} prompts x generate.k = {k}{times})"
        )
        raise ConfigError(f"select.budget must be at most the {of_what}, got {budget}; lower it, or add prompts")
    queries = label_queries(config, num_prompts, num_seed if config.generate.source == "seed" else num_prompts * k)
    paired = sum(queries) // k if config.labels == "direct" else num_prompts
    return Counts(
        num_prompts=num_prompts,
        num_responses=num_responses,
        label_queries=queries,
        **_evaluated(config),
        num_pairs=num_pairs_planned(config.pseudo_label.pairing, paired, k) * config.rounds,
    )


def count_rlp(config: RunConfig, num_kept: int, num_seed: int, num_pairs: int | None) -> Counts:
    """What is compared or judged; PPO's own rollouts are not counted.

    Args:
        config: the run.
        num_kept: prompts of the pool.
        num_seed: responses of the seed data.
        num_pairs: of the preference file, if there is one.

    Raises:
        ConfigError: the budget is larger than what can be asked about.
    """
    if config.ppo.reward == "evaluator":
        return replace(count_proxy_dpo(config, num_kept, num_seed), num_pairs=0)
    num_prompts = _num_prompts(config, num_kept)
    counts = Counts(
        num_prompts=num_prompts,
        num_responses=0,
        label_queries=(),
        **_evaluated(config),
        num_pairs=num_pairs or 0,
    )
    if config.ppo.reward == "function":
        return counts
    queries = label_queries(config, num_prompts, num_prompts * config.generate.k)
    if config.preferences is not None and config.preferences.source == "oracle":
        num_pairs = sum(queries) // queries_per_pair(config.preferences.order)
    num_labelled = num_prompts * config.generate.k * bool(queries)
    return replace(
        counts,
        num_responses=(num_labelled + _num_sampled(config, num_prompts) * config.refresh.n) * config.rounds,
        label_queries=queries,
        num_eval_queries=counts.num_eval_queries + config.evaluate.diagnosis_budget,
        num_pairs=num_pairs or 0,
    )


def queries_per_eval_prompt(config: RunConfig) -> int:
    """What judging all policies on one held-out prompt takes."""
    return queries_per_prompt(num_policies(config), config.competes_by)


def _evaluated(config: RunConfig) -> dict[str, int]:
    each = queries_per_eval_prompt(config)
    num_judged = min(config.pool.num_eval, config.evaluate.budget // each)
    num_compared = each - num_policies(config) if config.competes_by in ("both", "random") else 0
    return {
        "num_judged_prompts": num_judged,
        "num_eval_queries": num_judged * each,
        "num_eval_comparisons": num_judged * num_compared,
    }


def _num_sampled(config: RunConfig, num_prompts: int) -> int:
    """Prompts the refresh samples, in whole blocks."""
    if config.refresh.method in ("ocrm", "none"):
        return 0
    size = config.generate.block_size
    return min(num_prompts, -(-(config.refresh.num_prompts or num_prompts) // size) * size)


def _num_prompts(config: RunConfig, num_kept: int) -> int:
    """Prompts that train; refuses to hold out all of them."""
    num_prompts = num_kept - config.pool.num_eval
    if num_prompts < 1:
        raise ConfigError(
            f"pool.num_eval must be below the number of prompts in the pool, {num_kept}, "
            f"got {config.pool.num_eval}; hold fewer out, or add prompts"
        )
    return num_prompts
