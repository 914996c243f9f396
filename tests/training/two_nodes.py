"""A program: a fit on two nodes with its run in a bucket; then a part that one node wrote is damaged there."""

import json
import logging
import sys

from ray.cluster_utils import Cluster

from rayrl.metrics.curves import read_metrics
from rayrl.runs import storage
from rayrl.training import checkpoints
from tests.training.faulty_disks import sft_fit, write_examples

TWO = {"num_workers": 2, "zero_stage": 1, "checkpoint_every": 1}


def main(folder: str) -> None:
    """Print which files each checkpoint has, and the steps that were trained, before and after the damage."""
    import ray

    logging.basicConfig(level=logging.WARNING)
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    cluster.add_node(num_cpus=1)
    cluster.add_node(num_cpus=1)  # a worker fills a node; what makes the rows needs one too
    ray.init(address=cluster.address, log_to_driver=False)
    table = write_examples(f"{folder}/examples")
    sft_fit(folder, table, **TWO)
    fit_url = f"{folder}/fit/fit"
    last, earlier = checkpoints.whole(fit_url)[:2]
    files = sorted(storage.sizes(f"{fit_url}/{last}"))
    steps = [row["step"] for row in read_metrics(f"{folder}/metrics/sft.jsonl")]
    of_rank_1 = storage.read_json(f"{fit_url}/{last}/rank-1-of-2.json")["files"]
    part = f"{fit_url}/{last}/{next(iter(of_rank_1))}"
    content = bytearray(storage.read_bytes(part))
    content[len(content) // 2] ^= 0xFF
    storage.write_bytes(part, bytes(content))
    sft_fit(folder, table, **TWO)
    logged = [json.loads(line)["step"] for line in storage.read_bytes(f"{folder}/metrics/sft.jsonl").splitlines()]
    print(json.dumps({"files": files, "steps": steps, "logged": logged, "names": [last, earlier]}))
    ray.shutdown()  # before the nodes: a driver whose raylet ends first ends with it, and fails
    cluster.shutdown()


if __name__ == "__main__":
    main(sys.argv[1])
