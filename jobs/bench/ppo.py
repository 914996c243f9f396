"""PPO's samples per second, the parts of its time, and its generation against raw vLLM at the same batch.

    python jobs/bench/ppo.py                               # runs the quickstart's first PPO, and what comes before it
    python jobs/bench/ppo.py --reuse runs/rlp_quickstart   # takes over the finished stages of a run of that config

The split is PPO's own curve, over all its rollouts. Generation is timed through the call that PPO makes for a rollout,
by the fleet that serves it, with M1's weights; raw vLLM answers the same prompts with the same weights, seeds and
sampling, a rollout's prompts in one call. Both engines stay up and one is idle while the other is measured; rounds
alternate, after one warm-up each. It needs two idle cores: the fleet's front end works beside its engine.
"""

import argparse
import logging
import tempfile
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import ray
from generation import comparison, raw, start_raw
from hardware import hardware
from plain_rlhf import plain_rlhf
from ray.actor import ActorHandle

from rayrl.config import RunConfig, load_config
from rayrl.fleets.services import Services
from rayrl.metrics.curves import read_metrics
from rayrl.pipelines.run_pipeline import run_pipeline
from rayrl.preflight import check
from rayrl.report.plots import TIMES
from rayrl.runs import storage
from rayrl.runs.run import Run
from rayrl.stages.sampling.generate import own_sampling
from rayrl.training.rollout import response_seeds, sample

MAX_SYNC_SHARE = 0.05
MIN_RATIO = 0.9

Round = tuple[float, list[list[int]]]
"""Seconds of generation, and the token ids of the responses."""


def measure(run: Run, services: Services, oracle: ActorHandle, arguments: argparse.Namespace, found: list[str]) -> Any:
    """Run plain RLHF, then the rounds; append the text to print to `found`. It is called as a pipeline."""
    done = plain_rlhf(run, services, oracle)
    curve = read_metrics(storage.join(run.url, "metrics", "ppo.jsonl"))
    found.append(split([row for row in curve if row["step"]]))  # at 0 M1 was measured
    fleet, sampling = services.ready(services.generators(done.m1)), own_sampling(run.config.generate)
    reward = done.r.serve(services)
    k = run.config.ppo.k
    prompts = [row for block in done.pool.train.blocks() for row in block.to_pylist()][: run.config.ppo.rollout_size]
    seeds = [f"bench {call}" for call in range(arguments.calls)]
    llm = start_raw(done.m1.path, run.config.generators)

    def through_fleet(seed: str) -> Round:
        answers = sample(fleet, done.m1, prompts, sampling, reward, step=0, seed=seed, k=k)
        return answers.generate_s, [said.token_ids for said in answers.continuations]

    def through_raw(seed: str) -> Round:
        drawn = (each for row in prompts for each in response_seeds(seed, row["id"], k))
        return raw(llm, [row["token_ids"] for row in prompts for _ in range(k)], drawn, sampling)

    rounds = [(calls(through_fleet, seeds), calls(through_raw, seeds)) for _ in range(arguments.repeats + 1)]
    ours, theirs = rounds[-1][0][1], rounds[-1][1][1]
    fleet_s, raw_s = ([sides[side][0] for sides in rounds[1:]] for side in (0, 1))
    equal = f"{sum(a == b for a, b in zip(ours, theirs, strict=True))} of {len(ours)}"
    table, ratio = comparison(fleet_s, raw_s, sum(map(len, theirs)), equal)
    found.append(
        f"{len(seeds)} rollouts of {len(prompts)} prompts x {k} a round, {run.config.generators.num_replicas} replica, "
        f"{run.config.generators.threads} thread\n\n{table}\n\n"
        f"Generation in PPO is to be at least {MIN_RATIO} of raw vLLM: {ratio:.3f}, {verdict(ratio >= MIN_RATIO)}"
    )


def calls(one: Callable[[str], Round], seeds: list[str]) -> Round:
    """Time one round: a few rollouts one after the other, as one is too short to time."""
    done = [one(seed) for seed in seeds]
    return sum(seconds for seconds, _ in done), [answer for _, answers in done for answer in answers]


def split(steps: list[dict[str, Any]]) -> str:
    """Make the table of PPO's time. A step is the wait for a rollout, the training on it and the sync.

    The parts may add up to more: with `ppo.overlap` the next rollout is sampled while this one trains, and without it
    while the checkpoint is written and the held-out reward is measured, which are no part of a step.
    """
    columns = {name: np.array([step[name] for step in steps]) for name in (*TIMES, "seconds")}
    num_responses = np.array([step["num_responses"] for step in steps])
    num_tokens = float((num_responses * [step["length"] for step in steps]).sum())
    total, generate_s = columns["seconds"].sum(), columns["generate_s"].sum()
    parts = {title: columns[name] for name, title in TIMES.items()}
    parts |= {"a step": columns["seconds"]}
    rows = [
        f"| {title} | {seconds.sum():.1f} | {np.median(seconds):.3f} | {seconds.sum() / total:.1%} |"
        for title, seconds in parts.items()
    ]
    share = columns["sync_s"].sum() / total
    lines = [
        f"PPO: {len(steps)} rollouts, {num_responses.sum():.0f} responses, {num_tokens:.0f} tokens: "
        f"{num_responses.sum() / total:.1f} samples/s; {num_tokens / generate_s:.0f} tokens/s while it generates",
        "",
        "| part | in all, s | median rollout, s | share |",
        "|---|---|---|---|",
        *rows,
        "",
        f"Weight sync is to be under {MAX_SYNC_SHARE:.0%} of a step: {share:.1%}, {verdict(share < MAX_SYNC_SHARE)}",
    ]
    return "\n".join(lines)


def verdict(kept: bool) -> str:
    return "holds" if kept else "BROKEN"


def config_of(arguments: argparse.Namespace, folder: str) -> RunConfig:
    """Load the config, with a run folder of its own: a run that is taken over stays as it is."""
    config = load_config(arguments.config, arguments.overrides)
    return config.model_copy(update={"name": "bench-ppo", "run_dir": folder, "reuse": arguments.reuse})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", nargs="?", default="jobs/configs/rlp_quickstart.toml")
    parser.add_argument("overrides", nargs="*", help="section.key=value")
    parser.add_argument("--reuse", help="folder of a run of this config whose first PPO is finished")
    parser.add_argument("--calls", type=int, default=4, help="rollouts in a round")
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    machine = hardware()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    ray.init(include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    found: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        config = config_of(arguments, folder)
        pipeline = partial(measure, arguments=arguments, found=found)
        run_pipeline(config, check(config), pipeline, ray_start_s=0.0)
    print(f"\n{machine}; {arguments.config}\n")
    print("\n\n".join(found))


if __name__ == "__main__":
    main()
