"""Warnings of a plan: what a user should know of a run that can start, but may not give what is wanted."""

from collections.abc import Sequence
from dataclasses import dataclass

from rayrl.algorithms.pairing import PAIRS_PER_QUERY
from rayrl.config import RunConfig
from rayrl.data.reading import PromptCounts
from rayrl.preflight.cluster import Cluster
from rayrl.preflight.cost import Cost
from rayrl.preflight.inputs import PoolFacts, unread_warnings
from rayrl.preflight.judge_prompts import JudgePromptFacts
from rayrl.preflight.model import ModelFacts
from rayrl.preflight.oracle_tables import TableFacts
from rayrl.preflight.plan import StagePlan
from rayrl.preflight.preferences import PairFacts
from rayrl.preflight.run_folder import DiskFacts
from rayrl.preflight.workload import Workload, queries_per_eval_prompt
from rayrl.runs.stage_table import DPO, FIT_REWARD_MODEL, stages_of


@dataclass(frozen=True, kw_only=True)
class PlanFacts:
    """What the check of a run has found."""

    cluster: Cluster
    """The nodes it has, and may get."""
    model: ModelFacts
    """Of the policy."""
    pool: PoolFacts
    seed: PromptCounts | None
    """Of the seed data, if there is any."""
    references: PromptCounts | None
    """Of the reference answers, if there are any."""
    tables: Sequence[TableFacts]
    """Of the tables that the oracle answers from."""
    pairs: PairFacts | None
    """Of the file of pairs, if there is one."""
    workload: Workload
    """Responses, queries and pairs."""
    cost: Cost | None
    """Price of the queries; None without prices."""
    judge_prompts: JudgePromptFacts | None
    """What the evaluator reads; None if nothing is known of it, or nothing read."""
    disk: DiskFacts
    """Needed and free bytes of the run directory."""
    stages: Sequence[StagePlan]
    """What each stage reserves."""


def plan_warnings(config: RunConfig, facts: PlanFacts) -> tuple[str, ...]:
    """Collect all warnings, those about the data first."""
    return (
        *_pool_warnings(config, facts.pool, facts.model),
        *([] if facts.seed is None else _seed_warnings(facts.seed)),
        *([] if facts.references is None else _table_warnings("evaluate.reference_answers", facts.references)),
        *(warning for table in facts.tables for warning in table.warnings()),
        *(_pair_warnings(config, facts.workload) if facts.pairs is None else facts.pairs.warnings()),
        *_cost_warnings(config, facts.cost),
        *_budget_warnings(config, facts.workload),
        *_batch_warnings(config, facts.workload),
        *([] if facts.judge_prompts is None else facts.judge_prompts.warnings()),
        *_ppo_warnings(config),
        *_cpu_warnings(config, facts.cluster),
        *_gpu_warnings(config, facts.cluster, facts.stages),
        *facts.disk.warnings(),
    )


def _pool_warnings(config: RunConfig, pool: PoolFacts, model: ModelFacts) -> list[str]:
    found = []
    counts = pool.counts
    if counts.num_duplicate or counts.num_empty:
        found.append(f"pool: dropped {counts.num_duplicate} duplicate and {counts.num_empty} empty prompts")
    if counts.num_with_control_tokens:
        found.append(
            f"pool: {counts.num_with_control_tokens} prompts hold control tokens of the policy's tokenizer, which are "
            "read as ordinary text; if they are to open and close turns, give chats in pool.messages_column instead"
        )
    if counts.num_dialogues:
        found.append(
            f"pool: {counts.num_dialogues} prompts are whole dialogues, Human: ... Assistant: ... or messages as JSON, "
            "with answers in them; to have them read as chats, name their column in pool.messages_column instead"
        )
    found += _table_warnings("pool", counts)
    if pool.num_cut:
        found.append(
            f"pool: {pool.num_cut} prompts (the longest has {pool.longest_tokens} tokens) leave less than "
            f"generate.max_tokens = {config.generate.max_tokens} of the context of {model.max_model_len}: "
            "their responses may be cut short"
        )
    if model.tokenizer is None:
        found.append(f"policy: no tokenizer.json of {config.policy.path} here: prompt lengths are not checked")
    if model.weights_bytes is None:
        found.append("policy: its weights are not on this machine: size, disk and format are not checked")
    return found


def _table_warnings(name: str, counts: PromptCounts) -> list[str]:
    """Warn of rows that were dropped, words in place of empty cells, and columns that are not read."""
    found = [f"{name}: {counts.bad_rows.in_words()}"] if counts.bad_rows.num else []
    if counts.num_null_words:
        found.append(
            f"{name}: {counts.num_null_words} prompts are but a word for an empty cell, such as nan, None or NULL; "
            "leave those cells empty if they are"
        )
    found += unread_warnings(name, counts)
    return found


def _seed_warnings(counts: PromptCounts) -> list[str]:
    found = _table_warnings("seed_data", counts)
    if counts.num_without_score:
        found.append(
            f"seed_data: {counts.num_without_score} rows have no score (an empty cell, or NaN) and are left out"
        )
    return found


def _pair_warnings(config: RunConfig, workload: Workload) -> list[str]:
    """Warn of few pairs for the money; rlp has no such ratio, since PPO learns from rewards."""
    if config.pipeline == "rlp":
        return []
    num_queries = workload.num_label_queries
    if config.labels == "expert":
        return [f'labels = "expert" pays for all {num_queries} responses, whatever the budget']
    per_query = workload.num_pairs / num_queries
    # "direct" is a control: it pairs nothing but the paid responses.
    if config.labels == "direct" or per_query >= PAIRS_PER_QUERY:
        return []
    remedy = "add prompts or raise generate.k"
    if config.pseudo_label.pairing == "best_worst":
        enough = PAIRS_PER_QUERY * num_queries
        remedy = f'add prompts ({enough} give {PAIRS_PER_QUERY}), or set pseudo_label.pairing = "margin"'
    return [f"{per_query:.1f} pairs per paid query, and {PAIRS_PER_QUERY} is the aim: {remedy}, or lower select.budget"]


def _cost_warnings(config: RunConfig, cost: Cost | None) -> list[str]:
    """Warn of a limit in USD that ends the queries early."""
    prices = config.oracle.prices()
    if cost is None or prices is None or prices.budget_usd is None or cost.total_usd <= prices.budget_usd:
        return []
    # Labels are asked for first: a limit above their price costs answers of the evaluation only.
    early = ""
    if cost.label_usd > prices.budget_usd:
        early = ", before all labels are asked for: the run then stops, and goes on once it is raised"
    return [
        f"the queries may cost {cost.total_usd:.2f} USD, and oracle.budget_usd stops them at "
        f"{prices.budget_usd:.2f}{early}"
    ]


def _budget_warnings(config: RunConfig, workload: Workload) -> list[str]:
    """Warn of budgets that cannot be spent, or do not reach."""
    found = []
    # A budget for judgements that the pool cannot fill was refused; comparisons come in whole pairs.
    if config.asks_for_comparisons and workload.num_label_queries < config.select.budget:
        found.append(
            f"select.budget = {config.select.budget} is not spent whole: one pair for each of {workload.num_prompts} "
            f"prompts and whole pairs only make {workload.num_label_queries} comparisons; add prompts, or lower it"
        )
    if config.pool.num_eval == 0:
        spent = f", and evaluate.budget = {config.evaluate.budget} is not spent" if config.evaluate.budget else ""
        found.append(
            f"pool.num_eval = 0 holds no prompt out: no policy is evaluated{spent}; hold some out to learn what the "
            "run has gained"
        )
    per_prompt = queries_per_eval_prompt(config)
    if 0 < config.evaluate.budget < per_prompt * config.pool.num_eval:
        found.append(
            f"evaluate.budget = {config.evaluate.budget} judges {workload.num_judged_prompts} "
            f"of the {config.pool.num_eval} held-out prompts, at {per_prompt} queries each"
        )
    return found


def _batch_warnings(config: RunConfig, workload: Workload) -> list[str]:
    """Warn of batches that are larger than all the pairs."""
    learners = {DPO: config.dpo, FIT_REWARD_MODEL: config.reward_model}
    stages = {stage for stage, _ in stages_of(config)}
    return [
        f"{stage.name}: batch_size = {training.batch_size:,} is more than all {workload.num_pairs:,} pairs, so that an "
        "epoch is one optimizer step; lower it"
        for stage, training in learners.items()
        if stage in stages and 0 < workload.num_pairs < training.batch_size
    ]


def _ppo_warnings(config: RunConfig) -> list[str]:
    """Warn of optimizer steps on a few responses that are left of a rollout."""
    num_responses, batch_size = config.ppo.responses_per_rollout, config.ppo.batch_size
    left = num_responses % batch_size
    if config.pipeline != "rlp" or left == 0:
        return []
    return [
        f"ppo.batch_size = {batch_size} does not divide a rollout's {num_responses} responses: the last optimizer step "
        f"of each pass over a rollout takes {left} of them"
    ]


def _cpu_warnings(config: RunConfig, cluster: Cluster) -> list[str]:
    """Warn of generators that slow each other down; their threads are not reserved, and so never refused."""
    threads = config.generators.num_replicas * config.generators.threads
    if cluster.most("GPU") > 0 or threads <= cluster.most("CPU"):
        return []
    return [f"generators: {threads} compute threads share {cluster.most('CPU'):g} CPUs; lower threads"]


def _gpu_warnings(config: RunConfig, cluster: Cluster, stages: Sequence[StagePlan]) -> list[str]:
    """Warn of GPUs that no stage uses, with the settings that use all."""
    num_gpus = int(max(cluster.has("GPU"), cluster.largest("GPU")))
    num_used = max(stage.num_gpus for stage in stages)
    if num_used == 0 or 2 * num_used > num_gpus:
        return []
    # In rlp the training, the generators and the embedders are up at the same time.
    num_workers, num_replicas = (num_gpus // 2, num_gpus // 4) if config.pipeline == "rlp" else (num_gpus, num_gpus)
    sections: dict[str, None] = {}
    roles: dict[str, float] = {}
    for stage, _ in stages_of(config):
        if training := stage.training(config):
            sections[training.section] = None
        for fleet in stage.fleets(config):
            if fleet.role != "entailment":
                engine = config.generators if fleet.role == "generators" else config.embedders
                roles[fleet.role] = engine.num_gpus
    lines = [f"{section}.num_workers={num_workers}" for section in sections]
    lines += [
        f"{role}.num_replicas={int(num_replicas / each)}" for role, each in roles.items() if 0 < each <= num_replicas
    ]
    return [
        f"the cluster has {num_gpus} GPUs, and no stage uses more than {num_used:g} at a time; to use all: "
        f"{' '.join(lines)}"
    ]
