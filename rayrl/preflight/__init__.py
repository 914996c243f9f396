"""Checks before work starts: refusals of a run that cannot end well, and the plan of what the run will do.

Loads no torch, vllm or transformers, and ray only to ask a running cluster, so that `--plan` takes under two
seconds. Memory is estimated (`rayrl.preflight.memory`), and refused where the size of a GPU is known.
"""

from rayrl.preflight.check import check
from rayrl.preflight.cluster import Cluster
from rayrl.preflight.discovery import find_cluster
from rayrl.preflight.plan import Plan, StagePlan, plan_as_json, render_plan

__all__ = ["Cluster", "Plan", "StagePlan", "check", "find_cluster", "plan_as_json", "render_plan"]
