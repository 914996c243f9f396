"""Check of a run before work starts: every refusal, in the order in which a user wants to read it, and then the plan.

Starts no actor and writes nothing. The checks themselves are in the modules beside this one.
"""

import importlib.util
import re
from pathlib import Path

from rayrl.config import RunConfig
from rayrl.errors import ConfigError, ResourceError
from rayrl.fleets.connection import LOCAL, cluster_address
from rayrl.models.judge_prompt import Rubric, load_rubric
from rayrl.preflight.cluster import Cluster
from rayrl.preflight.clustering_models import inspect_clustering_models
from rayrl.preflight.cost import estimate_cost
from rayrl.preflight.descriptions import describe_people
from rayrl.preflight.discovery import find_cluster
from rayrl.preflight.engine_settings import check_engines
from rayrl.preflight.inputs import check_held_out, inspect_others, inspect_pool, inspect_seed_data
from rayrl.preflight.judge_prompts import inspect_judge_prompts
from rayrl.preflight.model import ModelFacts, inspect_model, model_folder
from rayrl.preflight.oracle_tables import inspect_oracle_tables
from rayrl.preflight.places import check_places
from rayrl.preflight.plan import Plan
from rayrl.preflight.plan_warnings import PlanFacts, plan_warnings
from rayrl.preflight.ppo_settings import check_room, check_transfer, check_warmup
from rayrl.preflight.preferences import PairFacts, inspect_preferences
from rayrl.preflight.ready_made_reward_model import inspect_reward_model
from rayrl.preflight.resources import resolved_dtype
from rayrl.preflight.run_folder import check_disk, check_run_folder
from rayrl.preflight.stage_plans import plan_stages
from rayrl.preflight.workload import describe_rounds, ledger_budgets, num_test_questions, plan_workload
from rayrl.runs.stage_table import stages_of


def check(
    config: RunConfig, *, cluster: Cluster | dict[str, float] | None = None, contact_oracle: bool = False
) -> Plan:
    """Refuse a run that cannot end well, or return the plan of it. Starts and writes nothing.

    Args:
        config: the run.
        cluster: the nodes it has and may get, or the resources of its only node; None asks the cluster of RAY_ADDRESS,
            or looks at this machine.
        contact_oracle: also import ppo.function, ask the judge's endpoint whether it answers, and the hub for a policy
            that is not in the cache yet.

    Raises:
        ConfigError, DataError, RunDirectoryError, ResourceError: one message: field, rule, value, remedy.
    """
    is_this_machine = cluster is None and cluster_address() == LOCAL
    if cluster is None:
        cluster = find_cluster()
    elif isinstance(cluster, dict):
        cluster = Cluster(nodes=(cluster,))
    cluster = on_device(config, cluster)
    if is_this_machine and cluster.most("GPU") > 0:
        check_torch()
    # What is cheapest to read comes first; what runs the user's code or uses the network comes last.
    check_run_folder(config)
    check_places(config)
    rubric = load_rubric(config.rubric)
    model = inspect_model(config.policy, has_gpu=cluster.most("GPU") > 0, online=contact_oracle)
    check_engines(config, model)
    check_adapters(config, model)
    if config.select.embedder != "policy":
        model_folder(config.select.embedder, None, online=contact_oracle, setting="select.embedder")
    pool = inspect_pool(config, model)
    check_held_out(config, pool.counts)
    seed = inspect_seed_data(config, model)
    references = inspect_others(config, model)
    tables = inspect_oracle_tables(config, pool.longest)
    inspect_clustering_models(config, online=contact_oracle)
    pairs = _inspect_rlp(config, model, cluster, online=contact_oracle) if config.pipeline == "rlp" else None
    workload = plan_workload(
        config,
        num_kept=pool.counts.num_kept,
        num_seed=0 if seed is None else seed.num_kept,
        num_file_pairs=0 if pairs is None else pairs.counts.num_pairs,
    )
    if config.pipeline == "rlp":
        check_warmup(config, workload.num_prompts)
    planned = plan_stages(config, cluster, model)
    disk = check_disk(config, model, workload.num_responses)
    judge_prompts = inspect_judge_prompts(config, rubric, model, pool)
    if contact_oracle:
        _contact(config, rubric)
    cost = estimate_cost(config, rubric, pool, model, workload)
    facts = PlanFacts(
        cluster=cluster,
        model=model,
        pool=pool,
        seed=seed,
        references=references,
        tables=tables,
        pairs=pairs,
        workload=workload,
        cost=cost,
        judge_prompts=judge_prompts,
        disk=disk,
        stages=planned.stages,
    )
    return Plan(
        name=config.name,
        pipeline=config.pipeline,
        run_dir=config.run_dir,
        oracle=config.oracle.label(),
        stages=planned.stages,
        cluster=cluster,
        dtype=resolved_dtype(config, cluster),
        mode=planned.mode,
        reference=planned.reference,
        num_prompts=workload.num_prompts,
        num_eval_prompts=config.pool.num_eval,
        num_responses=workload.num_responses,
        label_queries=workload.label_queries,
        num_eval_queries=workload.num_eval_queries,
        num_eval_comparisons=workload.num_eval_comparisons,
        num_pairs=workload.num_pairs,
        budgets=ledger_budgets(config, workload.label_queries),
        test_prompts=pool.first,
        people=describe_people(config.oracle),
        usd=None if cost is None else cost.total_usd,
        disk_bytes=disk.needed,
        free_bytes=disk.free,
        warnings=plan_warnings(config, facts),
        num_test_questions=num_test_questions(config),
        operation=operation_by_table(config),
        rounds=describe_rounds(config, workload.label_queries),
    )


def operation_by_table(config: RunConfig) -> dict[str, tuple[str, ...]]:
    """Group the settings that may change between two starts by their table; "run" has those outside of any."""
    names: dict[str, list[str]] = {}
    for setting in config.operation():
        table, _, name = setting.rpartition(".")
        names.setdefault(table or "run", []).append(name)
    return {table: tuple(settings) for table, settings in names.items()}


def on_device(config: RunConfig, cluster: Cluster) -> Cluster:
    """Return the cluster as the run's device has it.

    Raises:
        ResourceError: the run is to use GPUs, and there are none.
        ConfigError: it is to compute in bfloat16, which the GPUs do not have.
    """
    if config.device == "cpu":
        return cluster.without_gpus()
    if config.device == "gpu" and cluster.most("GPU") == 0:
        remark = f"; {cluster.remark}" if cluster.remark else ""
        raise ResourceError(
            'device must be "cpu" or "auto" on a cluster without GPUs, got "gpu"; change it, or use a cluster that has '
            f"GPUs{remark}"
        )
    if cluster.most("GPU") > 0 and config.policy.dtype == "bfloat16" and not cluster.has_bfloat16():
        raise ConfigError(
            'policy.dtype must be "float32" or "auto" on GPUs of a compute capability below 8.0, which have no '
            'bfloat16, got "bfloat16"; change it, or use newer GPUs'
        )
    return cluster


def check_torch() -> None:
    """Refuse GPUs that the installed torch cannot use; torch itself takes seconds to import, and is not.

    Raises:
        ResourceError: torch is a build for CPUs.
    """
    spec = importlib.util.find_spec("torch")
    folders = (spec.submodule_search_locations if spec else None) or []
    for file in (Path(folder, "version.py") for folder in folders):
        if file.is_file() and re.search(r"^cuda\b[^=]*=\s*None", file.read_text(), re.MULTILINE):
            raise ResourceError(
                'device must be "cpu" where torch is a build for CPUs, as it is here, and this machine has GPUs, which '
                '"auto" and "gpu" would use; install the GPU builds (pip install ".[gpu]"), or set device = "cpu"'
            )


def check_adapters(config: RunConfig, model: ModelFacts) -> None:
    """Refuse adapters for layers that the policy does not have.

    Raises:
        ConfigError: names the layers, and those that there are.
    """
    for stage, _ in stages_of(config):
        training = stage.training(config)
        lora = None if training is None else training.settings.lora
        if training is None or lora is None or lora.target_modules == "all-linear" or model.linear_names is None:
            continue
        others = sorted(set(lora.target_modules) - set(model.linear_names))
        if others or not lora.target_modules:
            raise ConfigError(
                f"{training.section}.lora.target_modules must name linear layers of {config.policy.path}, got "
                f"{', '.join(others) or 'none'}; its linear layers are {', '.join(model.linear_names)}, and "
                '"all-linear" is all of them'
            )


def _inspect_rlp(config: RunConfig, model: ModelFacts, cluster: Cluster, *, online: bool) -> PairFacts | None:
    check_transfer(config, cluster)
    check_room(config, model)
    inspect_reward_model(config, online=online)
    return inspect_preferences(config, model)


def _contact(config: RunConfig, rubric: Rubric) -> None:
    """Try the oracle, and load the reward function: both run code of the user's, or use the network."""
    from rayrl.oracles.build import check_oracle
    from rayrl.oracles.scripted import source_of

    check_oracle(config.oracle, rubric)
    # Its text is part of the key of PPO's work: a function without one, as a built-in's, cannot be resumed.
    if config.pipeline == "rlp" and config.ppo.function is not None:
        source_of(config.ppo.function, "ppo.function")
