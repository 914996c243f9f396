"""Small SFT fits for tests of what disks do to checkpoints; run as a program, a fit on a disk that fills up."""

import logging
import resource
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from rayrl.config import PolicyConfig, SftConfig
from rayrl.data.blocks import BlockTable
from rayrl.errors import DiskFull
from rayrl.fleets.local_cluster import wait_until
from rayrl.records import Checkpoint
from rayrl.stages.fitting import stream_of
from rayrl.training import checkpoints
from rayrl.training.launch import fit
from rayrl.training.sft import SftJob, train_sft

NUM_ROWS, BATCH_SIZE, NUM_STEPS = 13, 2, 7
MODEL = str(Path(__file__).parents[2] / "jobs" / "quickstart" / "model")


@dataclass(frozen=True)
class FullDisk:
    """A training loop that finds no room for its second checkpoint."""

    limit_bytes: int | None = None
    """Largest file a worker may write from then on; None: the disk of the run is filled instead."""

    def __call__(self, job: Any, data: Any) -> None:
        def tables():
            for number, table in enumerate(data()):
                if number == 2:  # behind the first checkpoint: three steps buffer ten rows
                    wait_until(lambda: bool(checkpoints.whole(f"{job.run_url}/fit/fit")), 60, "the first checkpoint")
                    self.fill(job.run_url)
                yield table

        train_sft(job, tables)  # type: ignore[arg-type]

    def fill(self, run_url: str) -> None:
        if self.limit_bytes is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (self.limit_bytes, resource.RLIM_INFINITY))
            return
        checkpoint = Path(run_url, "fit", "fit", checkpoints.whole(f"{run_url}/fit/fit")[0])
        half = sum(file.stat().st_size for file in checkpoint.rglob("*") if file.is_file()) // 2
        with open(Path(run_url, "filler"), "wb") as filler:
            filler.write(bytes(shutil.disk_usage(run_url).free - half))


def write_examples(folder) -> BlockTable:
    """Prompts and responses of random tokens, in three blocks."""
    generator = torch.Generator().manual_seed(1)

    def tokens():
        length = int(torch.randint(3, 20, (1,), generator=generator))
        return torch.randint(3, 700, (length,), generator=generator).tolist()

    import pyarrow as pa

    rows = [{"prompt_token_ids": tokens(), "response_token_ids": tokens()} for _ in range(NUM_ROWS)]
    table = BlockTable(str(folder), 3)
    for block, start in enumerate((0, 5, 10)):
        table.write(block, pa.Table.from_pylist(rows[start : start + 5]))
    return table


def sft_fit(folder, table, loop=train_sft, **settings) -> None:
    """One SFT of the quickstart's model with a checkpoint every other step."""
    settings = {"batch_size": BATCH_SIZE, "epochs": 1, "checkpoint_every": 2, "max_failures": 0} | settings
    training = SftConfig(learning_rate=1e-3, **settings)
    job = SftJob(
        stage="sft",
        run_url=str(folder),
        checkpoint_url=f"{folder}/checkpoint",
        policy=PolicyConfig(path=MODEL),
        start=Checkpoint(path=MODEL, version="m0"),
        training=training,
        dtype="float32",
        seed=0,
        num_rows=NUM_ROWS,
    )
    fit(loop, job, training, stream_of(table, 0), storage=f"{folder}/fit", on_gpu=False)


def main(folder: str) -> None:
    """On a disk of its own: a fit that finds it full, and the same fit when there is room again."""
    import ray

    logging.basicConfig(level=logging.INFO)
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    table = write_examples(f"{folder}/examples")
    try:
        sft_fit(folder, table, FullDisk())
    except DiskFull as error:
        print(f"refused: {error}")
    print(f"kept: {checkpoints.whole(f'{folder}/fit/fit')}")
    # Folders only: Ray Train's list has such a name too, and is there or not by whether it was written before the fill.
    folders = [path for path in Path(folder, "fit", "fit").glob("checkpoint_*") if path.is_dir()]
    print(f"there: {sorted(path.name for path in folders)}")
    Path(folder, "filler").unlink()
    sft_fit(folder, table)
    print("finished")


if __name__ == "__main__":
    main(sys.argv[1])
