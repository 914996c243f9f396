"""Run the proxy-reward pipeline: `python jobs/proxy_dpo.py CONFIG.toml [section.key=value ...] [--plan]`."""

import sys
from pathlib import Path

if __name__ == "__main__":
    # Python puts a script's own folder first on the import path, where it would hide the user's modules.
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from rayrl.pipelines.command_line import main as run_job


def main(arguments: list[str]) -> int:
    """Run the pipeline, or with --plan print its plan; return the exit code, 2 for a mistake of the user."""
    return run_job("proxy_dpo", arguments, __doc__)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
