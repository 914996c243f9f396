"""`check`: every refusal, in the order in which a user would want to hear it, and then the plan."""

from rayrl.config import HttpOracleConfig, RunConfig
from rayrl.data.reading import PromptCounts
from rayrl.errors import ConfigError
from rayrl.models.judge_prompt import Rubric, evaluator_prompt, expert_prompt, load_rubric
from rayrl.models.pairwise_prompt import pairwise_prompt
from rayrl.preflight.cluster import Cluster, find_cluster
from rayrl.preflight.counts import Counts, count_proxy_dpo, count_rlp, queries_per_eval_prompt
from rayrl.preflight.inputs import PoolFacts, count_tokens, inspect_others, inspect_pool, inspect_seed_data
from rayrl.preflight.model import ModelFacts, inspect_model, model_folder
from rayrl.preflight.plan import Plan, StagePlan
from rayrl.preflight.preferences import PairFacts, inspect_preferences
from rayrl.preflight.resources import plan_stages
from rayrl.preflight.reward_model import inspect_reward_model
from rayrl.preflight.rlp import check_room, check_transfer, plan_rlp_stages
from rayrl.preflight.rounds import describe_rounds
from rayrl.preflight.run_folder import check_disk, check_run_folder
from rayrl.preflight.synthesis import inspect_synthesis

PAIRS_PER_QUERY = 9
"""What the paper's label budget buys, and what a run aims at."""


def check(
    config: RunConfig, *, cluster: Cluster | dict[str, float] | None = None, contact_oracle: bool = False
) -> Plan:
    """Refuse a run that cannot end well, or say what it will do. Starts and writes nothing.

    Args:
        config: the run.
        cluster: what it has and may get, or the resources of its only node; None asks the cluster of RAY_ADDRESS, or
            looks at this machine.
        contact_oracle: also import ppo.function, ask the judge if it is there, and the hub for a policy not cached yet.

    Raises:
        ConfigError, DataError, RunDirectoryError, ResourceError: one message: field, rule, value, remedy.
    """
    cluster = Cluster(nodes=(cluster,)) if isinstance(cluster, dict) else cluster or find_cluster()
    check_run_folder(config)
    rubric = load_rubric(config.rubric)
    model = inspect_model(config.policy, has_gpu=cluster.most("GPU") > 0, online=contact_oracle)
    if config.select.embedder != "policy":
        model_folder(config.select.embedder, None, online=contact_oracle, setting="select.embedder")
    pool = inspect_pool(config, model)
    seed = inspect_seed_data(config, model)
    inspect_others(config)
    inspect_synthesis(config, online=contact_oracle)
    pairs = _inspect_rlp(config, model, cluster, online=contact_oracle) if config.pipeline == "rlp" else None
    counts = _counted(config, pool, seed, pairs)
    stages, mode, reference = _staged(config, model, cluster)
    disk = check_disk(config, model, counts.num_responses)
    rubric_tokens = _check_evaluator_context(config, rubric, model)
    if contact_oracle:
        _contact(config, rubric)
    usd = _usd(config, rubric, pool, model, counts)
    return Plan(
        name=config.name,
        pipeline=config.pipeline,
        run_dir=config.run_dir,
        stages=stages,
        cluster=cluster,
        mode=mode,
        reference=reference,
        num_prompts=counts.num_prompts,
        num_eval_prompts=config.pool.num_eval,
        num_responses=counts.num_responses,
        label_queries=counts.label_queries,
        num_eval_queries=counts.num_eval_queries,
        num_eval_comparisons=counts.num_eval_comparisons,
        num_pairs=counts.num_pairs,
        usd=None if usd is None else sum(usd),
        disk_bytes=disk.needed,
        free_bytes=disk.free,
        warnings=(
            *_pool_warnings(config, pool, model),
            *_pairs_warnings(config, counts, pairs),
            *_money_warnings(config, counts, usd),
            *_evaluator_warnings(config, pool, model, rubric_tokens),
            *_cpu_warnings(config, cluster),
            *disk.warnings(),
        ),
        rounds=describe_rounds(config, stages, counts.label_queries),
    )


def _counted(config: RunConfig, pool: PoolFacts, seed: PromptCounts | None, pairs: PairFacts | None) -> Counts:
    num_kept, num_seed = pool.counts.num_kept, seed.num_kept if seed else 0
    if config.pipeline == "rlp":
        return count_rlp(config, num_kept, num_seed, pairs.counts.num_pairs if pairs else None)
    return count_proxy_dpo(config, num_kept, num_seed)


def _staged(config: RunConfig, model: ModelFacts, cluster: Cluster) -> tuple[tuple[StagePlan, ...], str, str]:
    """The stages, the mode, and where the reference log-probabilities come from. Without a GPU, weights take memory."""
    width = 4 if config.policy.dtype in ("auto", "float32") else 2
    copy_bytes = 0 if cluster.most("GPU") > 0 else width * (model.num_parameters or 0)
    if config.pipeline == "rlp":
        return plan_rlp_stages(config, cluster, copy_bytes), "overlap", "generation"
    return plan_stages(config, cluster, copy_bytes)


def _contact(config: RunConfig, rubric: Rubric) -> None:
    from rayrl.oracles.build import build_oracle
    from rayrl.oracles.scripted import source_of

    build_oracle(config.oracle, rubric).check()
    if config.pipeline == "rlp" and config.ppo.function is not None:
        source_of(config.ppo.function, "ppo.function")


def _inspect_rlp(config: RunConfig, model: ModelFacts, cluster: Cluster, *, online: bool) -> PairFacts | None:
    check_transfer(config, cluster)
    check_room(config, model)
    inspect_reward_model(config, online=online)
    return inspect_preferences(config, model)


def _usd(
    config: RunConfig, rubric: Rubric, pool: PoolFacts, model: ModelFacts, counts: Counts
) -> tuple[float, float] | None:
    """Price of the labels and of the evaluation if responses and verdicts are as long as allowed."""
    oracle = config.oracle
    if not isinstance(oracle, HttpOracleConfig) or oracle.usd_per_1m_input is None:
        return None

    def price(question: str, num_responses: int) -> float:
        asked = count_tokens(config, model, [question])[0]
        num_input = asked + pool.mean_tokens + num_responses * config.generate.max_tokens
        return (num_input * (oracle.usd_per_1m_input or 0) + oracle.max_tokens * (oracle.usd_per_1m_output or 0)) / 1e6

    judgement, comparison = price(expert_prompt(rubric, "", ""), 1), price(pairwise_prompt(rubric, "", "", ""), 2)
    label = comparison if config.asks_for_comparisons else judgement
    num_judgements = counts.num_eval_queries - counts.num_eval_comparisons
    return label * counts.num_label_queries, judgement * num_judgements + comparison * counts.num_eval_comparisons


def _check_evaluator_context(config: RunConfig, rubric: Rubric, model: ModelFacts) -> int:
    """Tokens of the rubric alone, as the evaluator or a policy that judges itself reads it; refuses one that fills the
    context. 0 where nobody reads it.
    """
    judges_itself = (
        config.pipeline == "rlp" and config.ppo.reward == "reward_model" and config.refresh.method == "self_judged"
    )
    learns = config.ppo.reward == "evaluator" if config.pipeline == "rlp" else config.labels in ("proxy", "shuffled")
    if not judges_itself and not (learns and config.evaluator.type == "generative"):
        return 0
    empty = evaluator_prompt(rubric, "", "", config.evaluator.scoring)
    num_tokens = count_tokens(config, model, [empty])[0]
    if model.tokenizer and model.max_model_len and num_tokens >= model.max_model_len:
        remedy = "another refresh.method" if judges_itself else 'evaluator.type = "scalar"'
        raise ConfigError(
            f"rubric.template must leave room in the context of {model.max_model_len} tokens, and has "
            f"{num_tokens} alone; give a shorter template, or set {remedy}"
        )
    return num_tokens


def _pool_warnings(config: RunConfig, pool: PoolFacts, model: ModelFacts) -> list[str]:
    found = []
    counts = pool.counts
    if counts.num_duplicate or counts.num_empty:
        found.append(f"pool: dropped {counts.num_duplicate} duplicate and {counts.num_empty} empty prompts")
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


def _pairs_warnings(config: RunConfig, counts: Counts, pairs: PairFacts | None) -> list[str]:
    if pairs is not None:
        return pairs.warnings()
    if config.pipeline == "rlp":
        return []
    found = []
    per_query = counts.num_pairs / counts.num_label_queries
    if config.labels in ("proxy", "shuffled") and per_query < PAIRS_PER_QUERY:
        wanted = PAIRS_PER_QUERY * counts.num_label_queries
        remedy = (
            f'add prompts ({wanted} give nine), or set pseudo_label.pairing = "margin"'
            if config.pseudo_label.pairing == "best_worst"
            else "add prompts or raise generate.k"
        )
        found.append(f"{per_query:.1f} pairs per paid query, and nine is the aim: {remedy}, or lower select.budget")
    if config.labels == "expert":
        found.append(f'labels = "expert" pays for all {counts.num_label_queries} responses, whatever the budget')
    return found


def _money_warnings(config: RunConfig, counts: Counts, usd: tuple[float, float] | None) -> list[str]:
    found = []
    budget_usd = config.oracle.budget_usd if isinstance(config.oracle, HttpOracleConfig) else None
    if usd is not None and budget_usd is not None and sum(usd) > budget_usd:
        early = ", before all labels are asked for" if usd[0] > budget_usd else ""
        found.append(
            f"the queries may cost {sum(usd):.2f} USD, and oracle.budget_usd stops them at {budget_usd:.2f}{early}"
        )
    if config.asks_for_comparisons and counts.num_label_queries < config.select.budget:
        found.append(
            f"select.budget = {config.select.budget} is not spent whole: one pair for each of {counts.num_prompts} "
            f"prompts and whole pairs only make {counts.num_label_queries} comparisons; add prompts, or lower it"
        )
    if 0 < config.evaluate.budget < queries_per_eval_prompt(config) * config.pool.num_eval:
        found.append(
            f"evaluate.budget = {config.evaluate.budget} judges {counts.num_judged_prompts} "
            f"of the {config.pool.num_eval} held-out prompts, at {queries_per_eval_prompt(config)} queries each"
        )
    return found


def _evaluator_warnings(config: RunConfig, pool: PoolFacts, model: ModelFacts, rubric_tokens: int) -> list[str]:
    if not rubric_tokens or not model.max_model_len:
        return []
    read = rubric_tokens + pool.longest_tokens + config.generate.max_tokens
    rationale = config.evaluator.max_rationale_tokens * (config.evaluator.scoring == "rationale_first")
    if read + rationale <= model.max_model_len:
        return []
    return [
        f"evaluator: rubric ({rubric_tokens} tokens), longest prompt ({pool.longest_tokens}), response "
        f"({config.generate.max_tokens}) and rationale ({rationale}) may exceed the context "
        f"of {model.max_model_len}"
    ]


def _cpu_warnings(config: RunConfig, cluster: Cluster) -> list[str]:
    threads = config.generators.num_replicas * config.generators.threads
    if cluster.most("GPU") > 0 or threads <= cluster.most("CPU"):
        return []
    return [f"generators: {threads} compute threads share {cluster.most('CPU'):g} CPUs; lower threads"]
