"""Run the proxy-reward pipeline: `python jobs/proxy_dpo.py CONFIG.toml [section.key=value ...] [--plan]`."""

import logging
import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from rayrl.config import RunConfig, load_config
from rayrl.errors import RayRLError

USAGE = "usage: python jobs/proxy_dpo.py CONFIG.toml [section.key=value ...] [--plan]"


def main(arguments: list[str]) -> int:
    """Run, or with --plan only say what would run; 0, or 2 for what the user can mend."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    if not arguments or arguments[0] in ("-h", "--help"):
        print(f"{__doc__}\n{USAGE}")
        return 0
    try:
        config = load_config(arguments[0], [a for a in arguments[1:] if a != "--plan"])
        return plan(config) if "--plan" in arguments else run(config)
    except RayRLError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def plan(config: RunConfig) -> int:
    """Print the resolved config, the stages, what they need and what they cost; start nothing."""
    from rayrl.preflight import check, render_plan

    print(config.model_dump_json(indent=2))
    print(render_plan(check(config)))
    return 0


def run(config: RunConfig) -> int:
    """Everything, from the preflight to the report."""
    import ray

    from rayrl.pipelines.launch import run_pipeline
    from rayrl.pipelines.proxy_dpo import proxy_dpo
    from rayrl.preflight import check

    plan = check(config, contact_oracle=True)
    started = time.monotonic()
    if not ray.is_initialized():
        ray.init(
            address=os.environ.get("RAY_ADDRESS"),
            include_dashboard=None,
            log_to_driver=False,
            logging_level=logging.WARNING,
        )
    report = run_pipeline(config, plan, proxy_dpo, ray_start_s=time.monotonic() - started)
    print(f"report: {report}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
