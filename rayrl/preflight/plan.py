"""What a run will do, need and pay, as a value and as text."""

from dataclasses import dataclass

from rayrl.preflight.cluster import Cluster, written


@dataclass(frozen=True, kw_only=True)
class Whole:
    """What one replica takes of a resource, all of it on one node."""

    resource: str
    amount: float
    setting: str
    """What to lower when no node has so much."""


@dataclass(frozen=True, kw_only=True)
class StagePlan:
    """One stage: what it does and what it reserves while it runs."""

    name: str
    what: str
    actors: str = ""
    """Engines and workers, for humans."""
    num_gpus: float = 0
    num_cpus: int = 0
    """Reserved CPUs: one per training worker; engines reserve none unless their config says so."""
    num_copies: int = 0
    """Of the policy's weights that its engines and workers hold in the nodes' memory, at least."""
    whole: tuple[Whole, ...] = ()
    setting: str = ""
    """What to lower when the cluster has too little."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The run, resolved. Counts are after duplicates and empty prompts were dropped."""

    name: str
    pipeline: str
    run_dir: str
    stages: tuple[StagePlan, ...]
    cluster: Cluster
    mode: str
    """"overlap" or "alternate"."""
    reference: str
    """Where DPO's reference log-probabilities come from: "generation" or "pass"."""
    num_prompts: int
    """Unlabelled prompts that train; the held-out ones come on top."""
    num_eval_prompts: int
    num_responses: int
    """Sampled for labels and for the refresh; PPO's rollouts are not counted."""
    label_queries: tuple[int, ...]
    """Paid in each round, at most; empty if nothing is asked."""
    num_eval_queries: int
    num_eval_comparisons: int
    """Of those: with reference answers."""
    num_pairs: int
    """Before ties are dropped."""
    usd: float | None
    """At most about this much for all paid queries; None without prices."""
    disk_bytes: int | None
    """Estimate of what is still to be written; None when the model's size is unknown."""
    free_bytes: int | None = None
    """Of the run directory's disk; None where it is remote."""
    warnings: tuple[str, ...] = ()
    rounds: str = ""
    """What they ask and repeat; empty if there is one."""

    @property
    def on_gpu(self) -> bool:
        """Whether engines and training take GPUs: if the cluster has one, or may get one."""
        return self.cluster.most("GPU") > 0

    @property
    def num_label_queries(self) -> int:
        return sum(self.label_queries)

    @property
    def pairs_per_query(self) -> float:
        return self.num_pairs / max(1, self.num_label_queries)


def render_plan(plan: Plan) -> str:
    """The plan as plain text, for a terminal or a log."""
    price = "no prices given" if plan.usd is None else f"at most about {plan.usd:,.2f} USD"
    beside = f" ({plan.num_eval_comparisons:,} comparisons with references)" if plan.num_eval_comparisons else ""
    disk = "unknown" if plan.disk_bytes is None else f"about {plan.disk_bytes / 2**30:,.2f} GiB"
    free = "" if plan.free_bytes is None else f"; {plan.free_bytes / 2**30:,.2f} GiB are free for run_dir"
    facts = {
        "run": f"{plan.name} -> {plan.run_dir}",
        **(_of_rlp(plan) if plan.pipeline == "rlp" else _of_proxy_dpo(plan)),
        "paid": f"{plan.num_label_queries:,} label queries and {plan.num_eval_queries:,} evaluation queries{beside}; "
        f"{price}",
        "disk": disk + free,
        "cluster": _of_cluster(plan.cluster),
    }
    if plan.rounds:
        facts["rounds"] = plan.rounds
    lines = [f"{name:<9}{fact}" for name, fact in facts.items()]
    name_width = 2 + max(len(stage.name) for stage in plan.stages)
    what_width = max(len(stage.what) for stage in plan.stages)
    lines += ["", f"{'stage':<{name_width}}{'what':<{what_width + 2}}reserves"]
    for stage in plan.stages:
        needs = [f"{stage.num_gpus:g} GPU"] * (stage.num_gpus > 0) + [f"{stage.num_cpus} CPU"] * (stage.num_cpus > 0)
        reserves = stage.actors + (f" ({', '.join(needs)})" if needs else "")
        lines.append(f"{stage.name:<{name_width}}{stage.what:<{what_width + 2}}{reserves}".rstrip())
    lines += ["", *(f"warning: {warning}" for warning in plan.warnings)] if plan.warnings else []
    return "\n".join(lines)


def _of_cluster(cluster: Cluster) -> str:
    has, most = (
        ", ".join(f"{written(of(resource))} {resource}" for resource in ("CPU", "GPU"))
        for of in (cluster.has, cluster.most)
    )
    return f"has {has}" + (f"; may grow to {most}" if most != has else "")


def _of_proxy_dpo(plan: Plan) -> dict[str, str]:
    how = {"overlap": "scoring streams into training", "alternate": "scoring ends before training starts"}
    num_each = plan.num_responses // max(plan.num_prompts, 1)
    return {
        "pool": f"{plan.num_prompts:,} prompts x {num_each} responses = {plan.num_responses:,}, "
        f"and {plan.num_eval_prompts:,} prompts held out",
        "pairs": f"{plan.num_pairs:,}, or {plan.pairs_per_query:.1f} per paid query, before ties are dropped",
        "mode": f"{plan.mode}: {how[plan.mode]}; reference log-probabilities from "
        f"{'generation' if plan.reference == 'generation' else 'one pass before the first step'}",
    }


def _of_rlp(plan: Plan) -> dict[str, str]:
    pairs = {"pairs": f"{plan.num_pairs:,} to learn from, before ties are dropped"} if plan.num_pairs else {}
    return {
        "pool": f"{plan.num_prompts:,} prompts, {plan.num_responses:,} responses besides PPO's own, "
        f"and {plan.num_eval_prompts:,} prompts held out",
        **pairs,
        "mode": "replicas stay up beside every training",
    }
