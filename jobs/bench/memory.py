"""The driver's memory as the tables grow: peak resident size at 20,000 and at 200,000 responses of 1 KB.

    python jobs/bench/memory.py

Each size is a fresh process that runs the table path of the pipeline: pool, responses, random selection, scores and
pairs. There is no engine: tasks make up the responses and the scores that a run would request from engines.
"""

import argparse
import json
import random
import resource
import tempfile
import time
from functools import partial
from typing import Any

import pyarrow as pa
import ray
from hardware import hardware
from sizes import made_up, measured

from rayrl.data.blocks import BlockTable, map_blocks
from rayrl.records import Response, Sampled, to_table
from rayrl.runs.run import Run, open_run
from rayrl.runs.stage_table import GENERATE, PSEUDO_LABEL
from rayrl.stages.artifacts import Responses
from rayrl.stages.proxy.pair_blocks import PairBlocks
from rayrl.stages.proxy.pseudo_label import Pairs, finish_pairs
from rayrl.stages.sampling.pool import read_pool
from rayrl.stages.selection.select import select

K = 4
BOUND_MB = 50


def fabricated(prompts: BlockTable, block: int) -> pa.Table:
    """Make up K responses of 1 KB to every prompt of a block."""
    draw = random.Random(block)
    sampled = [
        Sampled(
            prompt_id=row["id"],
            prompt=row["text"],
            prompt_token_ids=row["token_ids"],
            responses=[_response(row["id"], i, draw) for i in range(K)],
        )
        for row in prompts.read(block).to_pylist()
    ]
    return to_table(sampled, Sampled)


def _response(prompt_id: str, index: int, draw: random.Random) -> Response:
    return Response(
        id=f"{prompt_id}-{index}",
        text=draw.randbytes(512).hex(),
        token_ids=list(draw.randbytes(200)),
        seed=index,
        policy_version="bench",
        logprob=-100.0,
        finish_reason="stop",
    )


class MadeUpScores:
    """Scorer in the evaluator's place."""

    concurrency = 4

    def score(self, items: list[Any], reasons: dict[int, Any] | None = None) -> list[float | None]:
        return [float(int(item.response[:4], 16) % 6) for item in items]


def table_path(run: Run, num_responses: int) -> dict[str, float]:
    """Run everything from the pool to the pairs; return the peak memory of this process in MB after each part."""
    peaks = {"ray up": peak_mb()}
    pool = read_pool(run)
    peaks["pool"] = peak_mb()
    table = BlockTable(run.folder(GENERATE, "table"), pool.train.num_blocks)
    counts = map_blocks(
        table, partial(fabricated, pool.train), concurrency=2, describe=lambda t: {"n": t.num_rows * K}, progress="make"
    )
    assert sum(count["n"] for count in counts) == num_responses
    peaks["responses"] = peak_mb()
    responses = Responses(
        key="bench",
        table=table,
        num_prompts=pool.num_prompts,
        num_responses=num_responses,
    )
    # random selection asks for no engine and no checkpoint
    select(run, None, None, responses)  # type: ignore[arg-type]
    peaks["select"] = peak_mb()
    folder = run.folder(PSEUDO_LABEL)
    blocks = PairBlocks(
        responses=table,
        scored=BlockTable(f"{folder}/scored", table.num_blocks),
        pairs=BlockTable(f"{folder}/table", table.num_blocks),
        scorer=MadeUpScores(),  # type: ignore[arg-type]
        paid={},
        config=run.config.pseudo_label,
    )
    pairs = Pairs(key="bench", blocks=blocks, mode="alternate", num_planned=0, num_done=None)
    finish_pairs(run, pairs)
    return peaks | {"pairs": peak_mb()}


def peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def one_size(num_responses: int) -> None:
    """Run the path in this process and print its peaks as JSON."""
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        changes = {"select.strategy": "random", "select.budget": 1700, "generate.k": K}
        config = made_up(folder, num_responses // K, changes)
        ray.init(include_dashboard=False, log_to_driver=False)
        peaks = table_path(open_run(config), num_responses)
    print(json.dumps(peaks | {"seconds": time.monotonic() - started}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs=2, default=[20_000, 200_000])
    parser.add_argument("--only", type=int, help="run one size in this process")
    arguments = parser.parse_args()
    if arguments.only:
        one_size(arguments.only)
        return
    machine = hardware()
    peaks = []
    for size in arguments.sizes:
        peaks.append(measured(__file__, size))
    growth = peaks[1]["pairs"] - peaks[0]["pairs"]
    print(f"\n{machine}; peak resident size of the driver, MB\n")
    print("| responses | " + " | ".join(peaks[0]) + " |")
    print("|---|" + "---|" * len(peaks[0]))
    for size, row in zip(arguments.sizes, peaks, strict=True):
        print(f"| {size} | " + " | ".join(f"{value:.0f}" for value in row.values()) + " |")
    print(f"| growth | | | | | {growth:.0f} (bound {BOUND_MB}: {'holds' if growth <= BOUND_MB else 'BROKEN'}) | |")


if __name__ == "__main__":
    main()
