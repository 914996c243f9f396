"""Losses of one training on 1, 2 and 4 ranks: the same steps, rows and learning rate, whatever the number of ranks.

    python jobs/bench/ranks.py

The quickstart's seed data is trained on in float32, over gloo, one thread a rank. Rank 0 draws the batches and deals
them, as in a run; the table has the largest difference of a step's loss from that of one rank without ZeRO.
"""

import argparse
import json
import os
import tempfile
from itertools import product
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from hardware import hardware

from rayrl.config import PolicyConfig, SftConfig
from rayrl.data.batches import deal, optimizer_batches
from rayrl.data.collate import collate
from rayrl.data.tokenizing import encode_prompt, encode_response, load_tokenizer
from rayrl.models.packing import is_packed
from rayrl.models.policy import TokenLogprobs, load_policy
from rayrl.records import Checkpoint
from rayrl.training import deepspeed_engine as zero
from rayrl.training.sft import collated

FOLDER = Path(__file__).parents[1] / "quickstart"
BOUND = 1e-4


def losses_of(rank: int, num_ranks: int, zero_stage: int, rendezvous: str, results: str) -> None:
    """Train as one of the ranks; rank 0 writes the losses of all steps."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(num_ranks))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=num_ranks)
    training: Any = SftConfig(zero_stage=zero_stage, learning_rate=1e-3, batch_size=16, micro_batch_tokens=256)  # type: ignore[arg-type]
    m1 = Checkpoint(path=str(FOLDER / "model"), version="m1")
    with zero.sharded_loading(training, torch.float32):
        policy = load_policy(m1, torch.float32)
        engine = zero.start(TokenLogprobs(policy), training, torch.float32, 25)
    packed = is_packed(policy)
    engine.train()
    table = rows()
    batches = optimizer_batches(lambda: [table], epochs=1, batch_size=training.batch_size, seed=0)
    losses: list[float] = []
    for mine in deal((batch for _, batch in batches), rank, num_ranks, zero.scattered):
        micro_batches = collated(mine, training.micro_batch_tokens, packed)
        weight = sum(int(batch.response_mask.sum()) for batch in micro_batches)
        step = zero.train_step(engine, micro_batches, lambda batch: -engine(batch).sum(), weight, collate([[0]], [[0]]))
        losses.append(step.loss)
    if rank == 0:
        Path(results).write_text(json.dumps(losses))
    dist.destroy_process_group()


def rows() -> pa.Table:
    """Tokenise the seed data."""
    tokenizer = load_tokenizer(PolicyConfig(path=str(FOLDER / "model")))
    found = [json.loads(line) for line in (FOLDER / "seed.jsonl").read_text().splitlines()]
    return pa.Table.from_pylist(
        [
            {
                "prompt_token_ids": encode_prompt(tokenizer, row["prompt"], "plain"),
                "response_token_ids": encode_response(tokenizer, row["response"], "plain"),
            }
            for row in found
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--stages", type=int, nargs="+", default=[0, 1, 2, 3])
    arguments = parser.parse_args()
    print(f"{hardware()}\n\n| ZeRO | ranks | steps | first loss | last loss | largest difference |")
    print("|---" * 6 + "|", flush=True)
    alone: list[float] = []
    largest = 0.0
    for zero_stage, num_ranks in product(arguments.stages, arguments.ranks):
        with tempfile.TemporaryDirectory() as folder:
            results = f"{folder}/losses.json"
            mp.spawn(losses_of, (num_ranks, zero_stage, f"{folder}/meet", results), nprocs=num_ranks)  # type: ignore[attr-defined]
            losses = json.loads(Path(results).read_text())
        alone = alone or losses
        assert len(losses) == len(alone), "another number of steps"
        difference = max(abs(one - other) for one, other in zip(alone, losses, strict=True))
        largest = max(largest, difference)
        print(
            f"| {zero_stage} | {num_ranks} | {len(losses)} | {losses[0]:.4f} | {losses[-1]:.4f} | {difference:.1e} |",
            flush=True,
        )
    print(f"\nlargest {largest:.1e} (bound {BOUND:.0e}: {'holds' if largest <= BOUND else 'BROKEN'})")


if __name__ == "__main__":
    main()
