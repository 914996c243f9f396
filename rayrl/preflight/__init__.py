"""Everything that can be refused before work starts, and the plan of what will be done.

Loads no torch, vllm or transformers, and ray only to ask a running cluster, so that `--plan` takes under two
seconds. What only shows at run time, such as a model too large for its GPU, is not known here.
"""

from rayrl.preflight.check import check
from rayrl.preflight.plan import Plan, StagePlan, render_plan
from rayrl.preflight.resources import cluster_resources

__all__ = ["Plan", "StagePlan", "check", "cluster_resources", "render_plan"]
