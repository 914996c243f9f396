"""Start-up times of a run's fits and engines, against bare ones.

    python jobs/bench/startup.py --run runs/quickstart     # a finished run; without one, run the pipeline first

A fit's start-up is its seconds less those of its steps and of all waits for rows but the first (metrics/): worker
processes, imports, loading, the first rows, checkpoints and the export. Engines that start side by side are counted as
the time until all are up, for on few cores each slows the others. The bound is the sum of an empty fit for every fit, a
bare engine started alone for every engine, and 15 s.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import ray
from hardware import hardware

from rayrl.config import EngineConfig, TrainingConfig
from rayrl.data.blocks import stream_blocks
from rayrl.engines.embedder import Embedder
from rayrl.engines.generator import Generator
from rayrl.engines.vllm_engine import EngineSpec, ServedEngine
from rayrl.fleets.fleet import start_fleet
from rayrl.records import Checkpoint
from rayrl.training.launch import fit

MARGIN_S = 15.0


def empty_fit() -> float:
    """Time a fit whose loop does nothing."""
    with tempfile.TemporaryDirectory() as folder:
        started = time.monotonic()
        fit(
            lambda job, data: None,
            None,
            TrainingConfig(),
            lambda rank, world_size: stream_blocks(1, lambda block: None, concurrency=1),  # type: ignore[arg-type]
            storage=folder,
            on_gpu=False,
        )
        return time.monotonic() - started


def bare_engine(kind: type[ServedEngine], pooling: str | None, policy: str) -> float:
    """Return the start-up seconds of an engine that is alone, counted as a run counts its own."""
    spec = EngineSpec(
        checkpoint=Checkpoint(path=policy, version="bench"),
        config=EngineConfig(),
        dtype="float32",
        max_model_len=None,
        trust_remote_code=False,
        on_gpu=False,
        pooling=pooling,
    )
    fleet = start_fleet("bench", kind, spec)
    (status,) = fleet.wait_ready()
    fleet.stop()
    return status["start_s"]


def paid(run: Path) -> dict[str, float]:
    """Return start-up seconds of a run's fits and engines, by name; an engine's count from the end of the last one."""
    timings = json.loads((run / "timings.json").read_text())
    seconds: dict[str, float] = {}
    for timing in timings:
        if timing["what"].startswith("fit:"):
            curve = (run / "metrics" / f"{timing['what'].removeprefix('fit:')}.jsonl").read_text().splitlines()
            steps = [json.loads(step) for step in curve]
            working = sum(step["seconds"] for step in steps) + sum(step["waited_s"] for step in steps[1:])
            seconds[timing["what"]] = timing["seconds"] - working
    covered = 0.0
    for timing in sorted((t for t in timings if t["what"].startswith("engine:")), key=lambda t: t["ended_at"]):
        begun = max(timing["ended_at"] - timing["seconds"], covered)
        covered = timing["ended_at"]
        seconds[timing["what"]] = seconds.get(timing["what"], 0.0) + covered - begun
    return seconds


def run_quickstart(folder: str) -> Path:
    """Run the whole pipeline on the embedded model."""
    from jobs.proxy_dpo import main as proxy_dpo

    assert proxy_dpo(["jobs/configs/quickstart.toml", f"run_dir={folder}"]) == 0
    return Path(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, help="a finished run of the quickstart")
    parser.add_argument("--policy", default="jobs/quickstart/model")
    arguments = parser.parse_args()
    machine = hardware()
    started = time.monotonic()
    ray.init(include_dashboard=False, log_to_driver=False)
    ray_s = time.monotonic() - started
    policy = str(Path(arguments.policy).absolute())
    bare: dict[str, float] = {"generators": bare_engine(Generator, None, policy)}
    bare["embedders"] = bare_engine(Embedder, "mean", policy)
    bare["fit"] = empty_fit()
    with tempfile.TemporaryDirectory() as folder:
        run = paid(arguments.run or run_quickstart(folder))
    print_table(machine, ray_s, bare, run)


def print_table(machine: str, ray_s: float, bare: dict[str, float], run: dict[str, float]) -> None:
    rows: list[tuple[str, Any, float]] = [("ray.init (in no sum)", "", ray_s)]
    for what, seconds in run.items():
        kind = "fit" if what.startswith("fit:") else next(k for k in ("generators", "embedders") if k in what)
        rows.append((what, seconds, bare[kind]))
    total, bound = sum(run.values()), sum(row[2] for row in rows[1:]) + MARGIN_S
    print(f"\n{machine}\n")
    print("| what | start-up in the run, s | bare, s |")
    print("|---|---|---|")
    for what, seconds, alone in rows:
        print(f"| {what} | {f'{seconds:.1f}' if seconds != '' else ''} | {alone:.1f} |")
    verdict = "holds" if total <= bound else "BROKEN"
    print(f"| total; the bound is bare + {MARGIN_S:.0f} s | {total:.1f} | {bound:.1f}: {verdict} |")


if __name__ == "__main__":
    main()
