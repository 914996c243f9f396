"""A pipeline whose engines are simulated, and all else real: `python -m jobs.bench.simulated_job CONFIG [key=value]`.

The pipeline is the one that the config names.
"""

import sys
import time

from jobs.oracles import quickstart
from rayrl.config import load_config
from rayrl.fleets.simulated import SimulatedServices
from rayrl.pipelines import run_pipeline as launch
from rayrl.pipelines.command_line import main

JUDGE_S = 0.2


def judge(prompt: str, response: str) -> tuple[float | None, str]:
    """The quickstart's expert, who needs a moment."""
    time.sleep(JUDGE_S)
    return quickstart.judge(prompt, response)


def reward(prompt: str, response: str) -> float:
    """Of a policy that is trained by PPO: between 0 and 5, by the response's words."""
    del prompt
    words = response.split()
    return 5.0 * sum(len(word) <= 3 for word in words) / max(1, len(words))


if __name__ == "__main__":
    launch.Services = SimulatedServices  # type: ignore[misc]
    arguments = sys.argv[1:]
    sys.exit(main(load_config(arguments[0], arguments[1:]).pipeline, arguments, __doc__ or ""))
