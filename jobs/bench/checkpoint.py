"""Stall of a training step at a checkpoint: copied and written in the background, beside written and copied at once.

    python jobs/bench/checkpoint.py --millions 60

One process, DeepSpeed without Ray. "at once" is what a checkpoint cost when training waited for it: DeepSpeed writes to
a temporary folder, the files are read again for their checksums, and they are copied to the run's folder.
"""

import argparse
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from hardware import hardware
from torch import nn

from rayrl.config import SftConfig
from rayrl.runs import storage
from rayrl.training import checkpoints
from rayrl.training import deepspeed_engine as zero

WIDTH = 1024


def start(millions: int) -> zero.Engine[nn.Module]:
    """Start an engine around about so many million weights, with one step taken, so that Adam has its state."""
    layers = [nn.Linear(WIDTH, WIDTH) for _ in range(max(1, millions * 10**6 // WIDTH**2))]
    engine = zero.start(nn.Sequential(*layers), SftConfig(), torch.float32, 100)
    inputs = torch.randn(4, WIDTH)
    zero.train_step(engine, [inputs], lambda batch: engine(batch).square().sum(), 4, inputs)
    return engine


def at_once(engine: zero.Engine[nn.Module], run_folder: Path, step: int) -> float:
    """Write, read and copy a checkpoint while the training waits; its seconds."""
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        zero.save(engine, folder, {"step": step})()
        checkpoints.seal(folder, step, 0, 1)
        shutil.copytree(folder, run_folder / f"old-{step}")
    return time.perf_counter() - started


def in_background(engine: zero.Engine[nn.Module], run_folder: Path, step: int) -> tuple[float, float]:
    """Copy a checkpoint, and write it in place; the seconds of both."""
    started = time.perf_counter()
    folder = tempfile.mkdtemp(dir=run_folder)
    write: Callable[[], None] = zero.save(engine, folder, {"step": step})
    copied = time.perf_counter()
    write()
    name = checkpoints.seal(folder, step, 0, 1)
    storage.move_files(folder, str(run_folder / f"new-{step}"), last=name)
    return copied - started, time.perf_counter() - copied


def main() -> None:
    """Print the medians."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--millions", type=int, default=60, help="weights")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--folder", default=tempfile.gettempdir(), help="where the run's folder is")
    arguments = parser.parse_args()
    print(hardware())
    with tempfile.TemporaryDirectory(dir=arguments.folder) as made:
        run_folder = Path(made)
        dist.init_process_group("gloo", init_method=f"file://{made}/rendezvous", rank=0, world_size=1)
        engine = start(arguments.millions)
        waits: list[float] = []
        copies: list[float] = []
        num_bytes = 0
        writes: list[float] = []
        for step in range(arguments.repeats):
            waits.append(at_once(engine, run_folder, step))
            copy_s, write_s = in_background(engine, run_folder, step)
            copies.append(copy_s)
            writes.append(write_s)
            num_bytes = sum(storage.sizes(f"{made}/new-{step}").values())
            for name in ("old", "new"):
                shutil.rmtree(run_folder / f"{name}-{step}")
        print(
            f"checkpoint of {num_bytes / 1e6:,.0f} MB: a step waits {statistics.median(waits):.2f} s at once, ", end=""
        )
        print(f"{statistics.median(copies):.2f} s now; written in {statistics.median(writes):.2f} s in the background")
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
