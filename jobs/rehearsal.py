"""Rehearse a run with simulated engines, and everything else real: `python -m jobs.rehearsal CONFIG [key=value ...]`.

The pipeline is the one that the config names. Times and answers of the engines are described in
rayrl/engines/simulated.py. `PROXY_DPO` and `PPO` are commands of short rehearsals, for tests and benches of recovery.
"""

import sys
import time

from jobs.oracles import quickstart
from rayrl.engines.simulated import SETTINGS
from rayrl.fleets.simulated import SimulatedServices
from rayrl.pipelines import run_pipeline as launch
from rayrl.pipelines.command_line import main
from rayrl.preflight import engine_settings

JUDGE_S = 0.2

PROXY_DPO = [
    sys.executable, "-m", "jobs.rehearsal", "jobs/configs/quickstart.toml",
    "pool.limit=216", "pool.num_eval=16", "generate.k=2", "generate.block_size=8", "generate.max_tokens=16",
    "generators.num_replicas=2", "generators.max_num_seqs=8", "generators.engine_args={request_s=0.2}",
    "embedders.num_replicas=2", "embedders.engine_args={request_s=0.02}", "select.budget=40", "select.num_shards=2",
    "sft.enabled=false", "oracle.function=jobs.rehearsal:judge", "oracle.max_concurrency=2",
    "evaluator.type=scalar", "evaluator.epochs=6", "evaluator.checkpoint_every=15", "evaluator.max_failures=20",
    "dpo.epochs=2", "dpo.checkpoint_every=4", "dpo.max_failures=20", "evaluate.budget=32",
]  # fmt: skip
"""The quickstart, in less than 90 seconds. Later settings override these."""

PPO = [
    sys.executable, "-m", "jobs.rehearsal", "jobs/configs/rlp_quickstart.toml",
    "pool.limit=120", "pool.num_eval=16", "sft.enabled=false", "generate.max_tokens=16", "generators.num_replicas=2",
    "generators.engine_args={request_s=0.1}", "ppo.reward=function", "ppo.function=jobs.rehearsal:reward",
    "ppo.rollout_size=16", "ppo.batch_size=8", "ppo.max_rollouts=12", "ppo.checkpoint_every=2", "ppo.evaluate_every=4",
    "ppo.max_failures=20", "ppo.max_kl=1000000", "evaluate.budget=64", "evaluate.best_of_n=0",
]  # fmt: skip
"""PPO alone, on a Python function. Responses of simulated replicas follow from the seeds, not from the weights."""


def judge(prompt: str, response: str) -> tuple[float | None, str]:
    """Judge like the quickstart's oracle, but take some time for it."""
    time.sleep(JUDGE_S)
    return quickstart.judge(prompt, response)


def compare(prompt: str, first: str, second: str) -> str:
    """Prefer the response of the higher `reward`: the quickstart's oracle finds simulated responses all alike."""
    time.sleep(JUDGE_S)
    a, b = reward(prompt, first), reward(prompt, second)
    return "tie" if a == b else "first" if a > b else "second"


def reward(prompt: str, response: str) -> float:
    """Reward a response for PPO by its share of short words, between 0 and 5."""
    del prompt
    words = response.split()
    return 5.0 * sum(len(word) <= 3 for word in words) / max(1, len(words))


if __name__ == "__main__":
    # The one place where a pipeline gets its services.
    launch.Services = SimulatedServices  # type: ignore[misc]
    engine_settings.known_arguments.update(SETTINGS)
    sys.exit(main(None, sys.argv[1:], __doc__, command="python -m jobs.rehearsal"))
