"""Plan of a run: what it will do, need and pay, as a value and as text."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from pydantic import TypeAdapter

from rayrl.config import RunConfig
from rayrl.preflight.cluster import Cluster, describe_amount
from rayrl.preflight.memory import GIB, TERMS, RoleMemory
from rayrl.records import Prompt

Mode = Literal["overlap", "alternate"]
"""Whether fleets stay up beside trainings, or make room for them."""
ReferenceSource = Literal["generation", "pass", "none"]
"""Origin of DPO's reference log-probabilities."""


@dataclass(frozen=True, kw_only=True)
class Whole:
    """The share of a resource that one replica needs on one node."""

    resource: str
    amount: float
    setting: str
    """The setting to lower when no node has so much."""


@dataclass(frozen=True, kw_only=True)
class GpuShare:
    """A fleet with several replicas on a GPU."""

    role: str
    num_replicas: int
    fraction: float
    """Of a GPU that Ray gives to a replica."""
    memory_share: float
    """Of a GPU's memory that a replica asks for."""


@dataclass(frozen=True, kw_only=True)
class Needs:
    """Reservations of a training, of a fleet, or of all that runs at the same time."""

    actors: str = ""
    """Engines and workers, for humans."""
    num_gpus: float = 0
    num_cpus: int = 0
    """Reserved CPUs: one per training worker; engines reserve none unless their config says so."""
    memory: tuple[RoleMemory, ...] = ()
    """Estimates by role; none where the model's sizes are not known."""
    gpu_shares: tuple[GpuShare, ...] = ()
    """Fleets whose replicas may be together on one GPU."""
    whole: tuple[Whole, ...] = ()
    setting: str = ""
    """The setting to lower when the cluster has too little."""


@dataclass(frozen=True, kw_only=True)
class StagePlan(Needs):
    """One stage: what it does, and the most that it reserves at a time; while it trains, if it does."""

    name: str
    """The stage's name in `rayrl.runs.stage_table`."""
    what: str


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The run, resolved. Counts are after duplicates and empty prompts were dropped."""

    name: str
    pipeline: str
    run_dir: str
    oracle: str
    """The oracle, for humans."""
    stages: tuple[StagePlan, ...]
    """Those of the first round, and those before and after all rounds."""
    cluster: Cluster
    """As the run's device has it: without GPUs where that is "cpu"."""
    dtype: str
    mode: Mode
    reference: ReferenceSource
    num_prompts: int
    """Unlabelled prompts that train; the held-out ones come on top."""
    num_eval_prompts: int
    num_responses: int
    """Sampled for labels and for the refresh; PPO's rollouts are not counted."""
    label_queries: tuple[int, ...]
    """Paid in each round, at most; empty if the oracle labels nothing."""
    num_eval_queries: int
    num_eval_comparisons: int
    """Of those: with reference answers."""
    num_pairs: int
    """Before ties are dropped."""
    budgets: Mapping[str, int]
    """Caps of the ledger: paid queries over all rounds, by `rayrl.runs.stage_table.Purpose`."""
    test_prompts: tuple[Prompt, ...]
    """Prompts of the pool that the oracle is tried out on before the first stage."""
    people: str
    """What people are asked, and that the run parks meanwhile; "" where nobody is asked."""
    usd: float | None
    """At most about this much for all paid queries; None without prices."""
    disk_bytes: int | None
    """Estimate of what is still to be written; None when the model's size is unknown."""
    free_bytes: int | None = None
    """Of the run directory's disk; None where it is remote."""
    warnings: tuple[str, ...] = ()
    num_test_questions: int = 0
    """Kinds of question of which one is asked before the first stage."""
    operation: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Settings that may change between two starts, by their table."""
    rounds: str = ""
    """Description of the rounds; empty if there is one."""

    @property
    def on_gpu(self) -> bool:
        """Return whether engines and training take GPUs: if the cluster has one, or may get one."""
        return self.cluster.most("GPU") > 0

    @property
    def num_label_queries(self) -> int:
        return sum(self.label_queries)

    @property
    def pairs_per_query(self) -> float:
        return self.num_pairs / max(1, self.num_label_queries)


def render_plan(plan: Plan) -> str:
    """Write the plan as plain text, for a terminal or a log."""
    lines = [f"{name:<9}{fact}" for name, fact in _facts(plan).items()]
    name_width = 2 + max(len(stage.name) for stage in plan.stages)
    what_width = 2 + max(len(stage.what) for stage in plan.stages)
    lines += ["", f"{'stage':<{name_width}}{'what':<{what_width}}reserves"]
    for stage in plan.stages:
        row = f"{stage.name:<{name_width}}{stage.what:<{what_width}}{stage.actors}{_amounts(stage)}"
        lines.append(row.rstrip())  # a stage of the driver alone reserves nothing
    lines += _memory_table(plan)
    if plan.warnings:
        lines.append("")
        lines += [f"warning: {warning}" for warning in plan.warnings]
    return "\n".join(lines)


def plan_as_json(config: RunConfig, plan: Plan) -> str:
    """Write the resolved config and the plan as JSON, for programs."""
    # Pydantic writes null for infinity, the limit of a cluster without one, which JSON does not have.
    tree = json.loads(TypeAdapter(Plan).dump_json(plan))
    return json.dumps({"config": config.model_dump(mode="json"), "plan": tree}, indent=2)


def _memory_table(plan: Plan) -> list[str]:
    """Estimated memory by stage and role, term by term."""
    rows = [(stage.name, role) for stage in plan.stages for role in stage.memory]
    if not rows:
        return ["", "memory: not estimated, since the policy's config.json is not on this machine, or lacks sizes"]
    place = "GPU" if plan.on_gpu else "process"
    gpu_bytes = plan.cluster.gpu_bytes()
    has = "" if not plan.on_gpu else ", of unknown size" if gpu_bytes is None else f" of {gpu_bytes / GIB:.1f} GiB"
    names = [name for name in TERMS if any(role.memory.terms.get(name) for _, role in rows)]
    header = ["memory", "role", *names, "sum"]
    has_host = any(role.memory.host for _, role in rows)
    cells = [header + (["beside it, in the node's memory"] if has_host else [])]
    for stage, role in rows:
        terms = [_gib(role.memory.terms.get(name, 0)) for name in names]
        host = [_gib(role.memory.host)] if has_host else []
        cells.append([stage, f"{role.num_processes} x {role.role}", *terms, _gib(role.memory.total), *host])
    widths = [2 + max(len(row[column]) for row in cells) for column in range(len(cells[0]))]
    table = ["".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells]
    return ["", f"estimated GiB of one {place}{has}, in {plan.dtype}:", *table]


def _gib(num_bytes: float) -> str:
    return f"{num_bytes / GIB:.1f}" if num_bytes else "-"


def _facts(plan: Plan) -> dict[str, str]:
    """The lines above the stages, by their titles."""
    paid = f"{plan.num_label_queries:,} label queries and {plan.num_eval_queries:,} evaluation queries"
    if plan.num_eval_comparisons:
        paid += f" ({plan.num_eval_comparisons:,} comparisons with references)"
    price = "no prices given" if plan.usd is None else f"at most about {plan.usd:,.2f} USD"
    disk = "unknown" if plan.disk_bytes is None else f"about {plan.disk_bytes / 2**30:,.2f} GiB"
    if plan.free_bytes is not None:
        disk += f"; {plan.free_bytes / 2**30:,.2f} GiB are free for run_dir"
    facts = {
        "run": f"{plan.name} -> {plan.run_dir}",
        **(_rlp_facts(plan) if plan.pipeline == "rlp" else _proxy_dpo_facts(plan)),
        "paid": f"{paid}; {price}",
        "oracle": f"{plan.oracle}; this plan has not asked it",
        **({"people": plan.people} if plan.people else {}),
        "test": _test_fact(plan.num_test_questions),
        "disk": disk,
        "cluster": _cluster_fact(plan.cluster),
    }
    if plan.rounds:
        facts["rounds"] = plan.rounds
    return facts


def _test_fact(num_questions: int) -> str:
    if num_questions == 0:
        return "the oracle is not tried out before the first stage"
    return f"{num_questions} paid test question(s) before the first stage"


def _proxy_dpo_facts(plan: Plan) -> dict[str, str]:
    # Over all rounds. A run that holds out all its prompts was refused, and a plan can be made by hand.
    num_each = plan.num_responses // max(plan.num_prompts, 1)
    meaning = "scoring streams into training" if plan.mode == "overlap" else "scoring ends before training starts"
    sources = {"generation": "from generation", "pass": "from one pass before the first step", "none": "not used"}
    return {
        "pool": f"{plan.num_prompts:,} prompts x {num_each} responses = {plan.num_responses:,}, "
        f"and {plan.num_eval_prompts:,} prompts held out",
        "pairs": f"{plan.num_pairs:,}, or {plan.pairs_per_query:.1f} per paid query, before ties are dropped",
        "mode": f"{plan.mode}: {meaning}; reference log-probabilities {sources[plan.reference]}",
    }


def _rlp_facts(plan: Plan) -> dict[str, str]:
    facts = {
        "pool": f"{plan.num_prompts:,} prompts, {plan.num_responses:,} responses besides PPO's own, "
        f"and {plan.num_eval_prompts:,} prompts held out",
    }
    # PPO on a function or an evaluator learns from no pairs.
    if plan.num_pairs:
        facts["pairs"] = f"{plan.num_pairs:,} to learn from, before ties are dropped"
    facts["mode"] = "replicas stay up beside every training"
    return facts


def _cluster_fact(cluster: Cluster) -> str:
    has = f"{describe_amount(cluster.has('CPU'))} CPU, {describe_amount(cluster.has('GPU'))} GPU"
    most = f"{describe_amount(cluster.most('CPU'))} CPU, {describe_amount(cluster.most('GPU'))} GPU"
    name = f"{cluster.name}: " if cluster.name else ""
    return f"{name}has {has}" if most == has else f"{name}has {has}; may grow to {most}"


def _amounts(stage: StagePlan) -> str:
    """GPUs and CPUs of a stage in brackets; empty if it reserves neither."""
    amounts = []
    if stage.num_gpus > 0:
        amounts.append(f"{stage.num_gpus:g} GPU")
    if stage.num_cpus > 0:
        amounts.append(f"{stage.num_cpus} CPU")
    return f" ({', '.join(amounts)})" if amounts else ""
