"""A program: a fit in a Ray of its own. After some steps it waits for another cluster, which Ray's tools find first."""

import sys
import time
from pathlib import Path
from typing import Any

import ray

from rayrl.fleets.local_cluster import wait_until
from rayrl.training.sft import train_sft
from tests.training.faulty_disks import BATCH_SIZE, sft_fit, write_examples

ROW_S = 1.0


def slow(job: Any, data: Any) -> None:
    """A training loop that lasts for several looks of Ray Train's at its controller."""

    def rows():
        for number, row in enumerate(data()):
            if number == 2 * BATCH_SIZE:
                wait_until(Path(job.run_url, "go").exists, 120, "another cluster")
            if number > 2 * BATCH_SIZE:
                time.sleep(ROW_S)
            yield row

    train_sft(job, rows)  # type: ignore[arg-type]


if __name__ == "__main__":
    ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    sft_fit(sys.argv[1], write_examples(f"{sys.argv[1]}/examples"), slow)
