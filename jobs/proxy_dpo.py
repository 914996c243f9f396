"""Run the proxy-reward pipeline: `python jobs/proxy_dpo.py CONFIG.toml [section.key=value ...] [--plan]`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from rayrl.pipelines.command_line import main as run_job


def main(arguments: list[str]) -> int:
    """Run the pipeline, or with --plan print its plan; return the exit code, 2 for a mistake of the user."""
    return run_job("proxy_dpo", arguments, __doc__)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
