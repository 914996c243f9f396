"""`check`: every refusal, in the order in which a user would want to hear it, and then the plan."""

from dataclasses import dataclass

from rayrl.algorithms.comparisons import queries_per_pair
from rayrl.config import HttpOracleConfig, RunConfig
from rayrl.errors import ConfigError
from rayrl.models.judge import Rubric, evaluator_prompt, expert_prompt, load_rubric
from rayrl.preflight.inputs import PoolFacts, count_tokens, inspect_others, inspect_pool, inspect_seed_data
from rayrl.preflight.model import ModelFacts, inspect_model, model_folder
from rayrl.preflight.place import check_disk, check_run_folder
from rayrl.preflight.plan import Plan
from rayrl.preflight.preferences import inspect_preferences
from rayrl.preflight.resources import cluster_resources, plan_stages
from rayrl.preflight.reward_model import inspect_reward_model
from rayrl.preflight.rlp import check_room, plan_rlp_stages
from rayrl.preflight.rounds import compares, describe_rounds, label_queries, num_policies

PAIRS_PER_QUERY = 9
"""What the paper's label budget buys, and what a run aims at."""


@dataclass(frozen=True, kw_only=True)
class _Counts:
    num_prompts: int
    num_responses: int
    label_queries: tuple[int, ...]
    """Of each round."""
    num_eval_queries: int
    num_pairs: int

    @property
    def num_label_queries(self) -> int:
        return sum(self.label_queries)


def check(config: RunConfig, *, cluster: dict[str, float] | None = None, contact_oracle: bool = False) -> Plan:
    """Refuse a run that cannot end well, or say what it will do. Starts and writes nothing.

    Args:
        config: the run.
        cluster: `ray.cluster_resources()`; None asks the cluster of RAY_ADDRESS, or looks at this machine.
        contact_oracle: also ask the judge whether it is there, and the hub for a policy not cached yet.

    Raises:
        ConfigError, DataError, RunDirectoryError, ResourceError: one message: field, rule, value, remedy.
    """
    cluster = cluster_resources() if cluster is None else cluster
    check_run_folder(config)
    rubric = load_rubric(config.rubric)
    model = inspect_model(config.policy, has_gpu=cluster.get("GPU", 0) > 0, online=contact_oracle)
    if config.select.embedder != "policy":
        model_folder(config.select.embedder, None, online=contact_oracle, setting="select.embedder")
    pool = inspect_pool(config, model)
    seed = inspect_seed_data(config, model)
    inspect_others(config)
    if is_rlp := config.pipeline == "rlp":
        check_room(config, model)
        inspect_reward_model(config, online=contact_oracle)
        pairs = inspect_preferences(config, model)
        counts = _count_rlp(config, pool.counts.num_kept, pairs.num_pairs if pairs else None)
        stages, mode, reference = plan_rlp_stages(config, cluster), "overlap", "generation"
    else:
        counts = _count(config, pool.counts.num_kept, seed.num_kept if seed else 0)
        stages, mode, reference = plan_stages(config, cluster)
    disk_bytes = check_disk(config, model, counts.num_responses)
    rubric_tokens = 0 if is_rlp else _check_evaluator_context(config, rubric, model)
    if contact_oracle:
        from rayrl.oracles.build import build_oracle

        build_oracle(config.oracle, rubric).check()
    usd = _usd(config, rubric, pool, model, counts)
    return Plan(
        name=config.name,
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
        num_pairs=counts.num_pairs,
        usd=usd,
        disk_bytes=disk_bytes,
        warnings=(
            *_pool_warnings(config, pool, model),
            *([] if is_rlp else _pairs_warnings(config, counts)),
            *_money_warnings(config, counts, usd),
            *_evaluator_warnings(config, pool, model, rubric_tokens),
            *_cpu_warnings(config, cluster),
        ),
        rounds=describe_rounds(config, stages, counts.label_queries),
    )


def _count(config: RunConfig, num_kept: int, num_seed: int) -> _Counts:
    """What is generated, asked and paired; refuses budgets the pool cannot fill."""
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
    per_prompt = num_policies(config) + bool(config.evaluate.reference_answers)
    return _Counts(
        num_prompts=num_prompts,
        num_responses=num_responses,
        label_queries=queries,
        num_eval_queries=min(config.pool.num_eval, config.evaluate.budget // per_prompt) * per_prompt,
        num_pairs=num_pairs_planned(config.pseudo_label.pairing, paired, k) * config.rounds,
    )


def _count_rlp(config: RunConfig, num_kept: int, num_pairs: int | None) -> _Counts:
    """What is compared, paid and paired; refuses budgets the pool cannot fill."""
    num_prompts = _num_prompts(config, num_kept)
    queries = label_queries(config, num_prompts, num_prompts * config.generate.k)
    each = queries_per_pair(config.preferences.order) if compares(config) and config.preferences else 1
    learns = config.ppo.reward == "reward_model"
    sampled = config.refresh.n * learns + config.generate.k * bool(queries)
    sides = num_policies(config) + bool(config.evaluate.reference_answers)
    return _Counts(
        num_prompts=num_prompts,
        num_responses=num_prompts * sampled * config.rounds,
        label_queries=queries,
        num_eval_queries=min(config.pool.num_eval, config.evaluate.budget // sides) * sides
        + config.evaluate.diagnosis_budget * learns,
        num_pairs=sum(queries) // each if num_pairs is None else num_pairs,
    )


def _num_prompts(config: RunConfig, num_kept: int) -> int:
    """Prompts that train; refuses to hold out all of them."""
    num_prompts = num_kept - config.pool.num_eval
    if num_prompts < 1:
        raise ConfigError(
            f"pool.num_eval must be below the number of prompts in the pool, {num_kept}, "
            f"got {config.pool.num_eval}; hold fewer out, or add prompts"
        )
    return num_prompts


def _usd(config: RunConfig, rubric: Rubric, pool: PoolFacts, model: ModelFacts, counts: _Counts) -> float | None:
    """Price of all paid queries if responses and verdicts are as long as allowed."""
    oracle = config.oracle
    if not isinstance(oracle, HttpOracleConfig) or oracle.usd_per_1m_input is None:
        return None
    asked = count_tokens(config, model, [expert_prompt(rubric, "", "")])[0]
    num_input = asked + pool.mean_tokens + config.generate.max_tokens
    usd_output = oracle.max_tokens * (oracle.usd_per_1m_output or 0)
    each = (num_input * oracle.usd_per_1m_input + usd_output) / 1e6
    return each * (counts.num_label_queries + counts.num_eval_queries)


def _check_evaluator_context(config: RunConfig, rubric: Rubric, model: ModelFacts) -> int:
    """Tokens of the rubric alone, as the evaluator reads it; refuses one that fills the context."""
    if config.evaluator.type != "generative" or config.labels not in ("proxy", "shuffled"):
        return 0
    empty = evaluator_prompt(rubric, "", "", config.evaluator.scoring)
    num_tokens = count_tokens(config, model, [empty])[0]
    if model.tokenizer and model.max_model_len and num_tokens >= model.max_model_len:
        raise ConfigError(
            f"rubric.template must leave room in the context of {model.max_model_len} tokens, and has "
            f'{num_tokens} alone; give a shorter template, or set evaluator.type = "scalar"'
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


def _pairs_warnings(config: RunConfig, counts: _Counts) -> list[str]:
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


def _money_warnings(config: RunConfig, counts: _Counts, usd: float | None) -> list[str]:
    found = []
    budget_usd = config.oracle.budget_usd if isinstance(config.oracle, HttpOracleConfig) else None
    if usd is not None and budget_usd is not None and usd > budget_usd:
        found.append(f"the queries may cost {usd:.2f} USD, and oracle.budget_usd stops them at {budget_usd:.2f}")
    per_prompt = num_policies(config) + bool(config.evaluate.reference_answers)
    if 0 < config.evaluate.budget < per_prompt * config.pool.num_eval:
        found.append(
            f"evaluate.budget = {config.evaluate.budget} judges {config.evaluate.budget // per_prompt} "
            f"of the {config.pool.num_eval} held-out prompts, at {per_prompt} queries each"
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


def _cpu_warnings(config: RunConfig, cluster: dict[str, float]) -> list[str]:
    threads = config.generators.num_replicas * config.generators.threads
    if cluster.get("GPU", 0) > 0 or threads <= cluster.get("CPU", 0):
        return []
    return [f"generators: {threads} compute threads share {cluster.get('CPU', 0):g} CPUs; lower threads"]
