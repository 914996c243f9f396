"""Descriptions of stages: the text of each row of the plan, one function per stage.

A stage without an entry is described by its name.
"""

from collections.abc import Callable

from rayrl.config import OracleBase, PanelOracleConfig, RunConfig
from rayrl.runs import stage_table as table
from rayrl.runs.stage_table import Stage


def describe_stage(stage: Stage, config: RunConfig) -> str:
    """Text of a stage's row in the plan of a run."""
    describe = _DESCRIPTIONS.get(stage)
    return stage.name if describe is None else describe(config)


def _select(config: RunConfig) -> str:
    select = config.select
    if config.labels == "expert":
        return "all responses"
    name = select.strategy
    if config.labels == "routed":
        name = f"{name}, then where heads are unsure, in {select.batches} batches"
    else:
        name += f" in {select.batches} batches" if select.batches > 1 else ""
        what = "round" if select.reads_evaluator else "batch"
        name += f", the first {what} by {select.first_batch}" if select.first_batch else ""
    return f"{name} over {select.text}, {select.num_shards} shard(s)" if config.embeds_pool else name


def _query(config: RunConfig) -> str:
    return "the oracle labels everything" if config.labels == "expert" else f"ask the {config.oracle.type} oracle"


def _preferences(config: RunConfig) -> str:
    if not config.asks_for_comparisons:
        return "pairs of a file"
    return f"the {config.oracle.type} oracle compares M1's responses"


def _fit_reward_model(config: RunConfig) -> str:
    reward_model = config.reward_model
    if reward_model.path is not None:
        return "a ready-made reward model"
    bottleneck = ", through a bottleneck" if reward_model.bottleneck is not None else ""
    if reward_model.num_members == 1:
        return f"Bradley-Terry from M1{bottleneck}"
    return f"Bradley-Terry from M1{bottleneck}, {reward_model.num_members} members, {reward_model.objective}"


_REWARDED_BY = {"reward_model": "", "evaluator": ", rewarded by the evaluator"}


def _ppo(config: RunConfig) -> str:
    reward = _REWARDED_BY.get(config.ppo.reward, f", rewarded by {config.ppo.function}")
    each = f" x {config.ppo.k}" if config.ppo.k > 1 else ""
    estimator = "" if config.ppo.advantages == "gae" else f", advantages by {config.ppo.advantages}"
    return f"M1 -> pi, rollouts of {config.ppo.rollout_size}{each}{estimator}{reward}"


def _samples(config: RunConfig) -> str:
    return f"{config.refresh.n} responses of pi per prompt"


_RANKED_BY = {"reward_pairs": "the old rewards", "self_judged": "the policy's own judgement"}
"""Controls of the refresh that pair the best response with the worst, by method."""


def _synthesize(config: RunConfig) -> str:
    refresh, spg = config.refresh, config.refresh.spg
    if refresh.method in _RANKED_BY:
        ranking = _RANKED_BY[refresh.method]
        return f"control: pair the best of {refresh.n} samples with the worst, by {ranking}"
    # rlp samples pi for it; proxy DPO clusters the responses that it has scored.
    samples_anew = config.pipeline == "rlp"
    responses = f"{refresh.n} samples a prompt" if samples_anew else "the responses of a prompt"
    return f"cluster {responses} by meaning ({spg.clustering}), pair (gamma {spg.gamma:g})"


_LEARNS_FROM = {
    "uml": "D, with a multi-view bottleneck on the samples",
    "ocrm": "importance-weighted preferences",
}
"""Data that r^ is fitted on, by method of the refresh; every other method fits D and the synthetic pairs."""


def _refit_reward_model(config: RunConfig) -> str:
    return f"refit on {_LEARNS_FROM.get(config.refresh.method, 'D and the synthetic pairs')}"


def _ppo_refreshed(config: RunConfig) -> str:
    is_kept = config.refresh.method == "none"
    return "M1 -> pi^, control: on the old rewards" if is_kept else "M1 -> pi^ on the refreshed rewards"


def _pseudo_label(config: RunConfig) -> str:
    pairing = config.pseudo_label.pairing
    if not table.fits_evaluator(config):
        return f"pair {pairing}, by the oracle's scores alone"
    return f"score the rest, pair {pairing}"


def _evaluate(config: RunConfig) -> str:
    aligned = "M2" if config.pipeline == "proxy_dpo" else "every policy"
    return f"{aligned} against M1 on held-out prompts"


# Without the stages that only later rounds have: they have no row.
_DESCRIPTIONS: dict[Stage, Callable[[RunConfig], str]] = {
    table.POOL: lambda config: f"read the prompts, hold {config.pool.num_eval} out",
    table.SFT: lambda config: "M0 -> M1 on the seed data",
    table.GENERATE: lambda config: f"{config.generate.k} responses per prompt",
    table.SEED_RESPONSES: lambda config: "control: ask about the seed data's responses",
    table.SELECT: _select,
    table.QUERY: _query,
    table.FIT_EVALUATOR: lambda config: f"{config.evaluator.type} evaluator on the paid judgements",
    table.PREFERENCES: _preferences,
    table.FIT_REWARD_MODEL: _fit_reward_model,
    table.PPO: _ppo,
    table.SAMPLES: _samples,
    table.SYNTHESIZE: _synthesize,
    table.IMPORTANCE: lambda config: "weigh D by how much likelier pi finds it than M1",
    table.REFIT_REWARD_MODEL: _refit_reward_model,
    table.PPO_REFRESHED: _ppo_refreshed,
    table.PSEUDO_LABEL: _pseudo_label,
    table.DPO: lambda config: f"M1 -> M2, {config.dpo.loss}, beta {config.dpo.beta:g}",
    table.TRACK_REWARDS: lambda config: "compare the rewards with the oracle along PPO",
    table.AUDIT_PAIRS: lambda config: "ask the oracle about synthetic pairs",
    table.EVALUATE: _evaluate,
}


def describe_people(oracle: OracleBase) -> str:
    """Say what people are asked, and how the run waits for them; "" where nobody is asked."""
    people = oracle.people_asked()
    if people is None:
        return ""
    which = "about everything"
    if isinstance(oracle, PanelOracleConfig):
        which = f"about at most {oracle.people_budget:,} items on which the judges differ by {oracle.people_above:g}"
    until = f", or {people.deadline.isoformat()}" if people.deadline is not None else ""
    return (
        f"asked {which}, {people.num_people} per item; the run parks until {people.enough:.0%} of a stage's questions "
        f"are answered{until}, and the same command goes on"
    )
