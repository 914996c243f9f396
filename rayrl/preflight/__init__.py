"""Checks before work starts: refusals of a run that cannot end well, and the plan of what the run will do.

Loads no torch, vllm or transformers, and ray only to ask a running cluster, so that `--plan` takes under two
seconds. What only shows at run time, such as a model too large for its GPU, is not known here.
"""

from rayrl.preflight.check import check
from rayrl.preflight.cluster import Cluster
from rayrl.preflight.discovery import find_cluster
from rayrl.preflight.plan import Plan, StagePlan, render_plan

__all__ = ["Cluster", "Plan", "StagePlan", "check", "find_cluster", "render_plan"]
