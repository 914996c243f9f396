"""Coreset shards as Ray actors: each owns the embeddings of some blocks and answers the rounds of the selection.

The driver sees ids and the vectors that shards offer, never the whole pool. The strategies are in
`rayrl.algorithms.selection`.
"""

from collections.abc import Callable
from typing import TypeVar

import numpy as np
import pyarrow as pa
import ray
from jaxtyping import Float32, Int64
from ray.exceptions import GetTimeoutError

from rayrl.algorithms.selection import CoresetShard
from rayrl.data.blocks import BlockTable
from rayrl.errors import StageTimeout
from rayrl.fleets import actors
from rayrl.fleets.actors import Actor
from rayrl.metrics import meters

T = TypeVar("T")
ROUND_TIMEOUT_S = 600.0
"""Longest wait for the answers of all shards to one question."""


def vectors_of(table: pa.Table) -> tuple[Int64[np.ndarray, " n"], Float32[np.ndarray, "n d"]]:
    """Return the ordinals and the vectors of an embeddings table."""
    ordinals = table["ordinal"].to_numpy()
    # The lists of one fixed length are one flat array in Arrow: no copy is needed to make a matrix of it.
    vectors = table["vector"].combine_chunks()
    return ordinals, vectors.flatten().to_numpy(zero_copy_only=False).reshape(len(ordinals), -1)


class BlockShard(CoresetShard):
    """A shard that reads its blocks itself: after a crash, it only has to be asked from the start again."""

    def __init__(self, table: BlockTable, blocks: list[int]):
        ids, vectors = [], []
        for block in blocks:
            part = table.read(block)
            if part.num_rows:  # an empty block does not know the vectors' dimension
                part_ids, part_vectors = vectors_of(part)
                ids.append(part_ids)
                vectors.append(part_vectors)
        super().__init__(np.concatenate(ids), np.concatenate(vectors))

    def apply(self, function: Callable[..., T], *arguments: object) -> T:
        """Run a strategy's function on this shard."""
        return function(self, *arguments)


class RayShards:
    """All shards of a pool as Ray actors: a `rayrl.algorithms.selection.ShardGroup`."""

    def __init__(self, name: str, table: BlockTable, num_shards: int):
        num_shards = min(num_shards, table.num_blocks)
        self.actors: list[Actor] = []
        for number in range(num_shards):
            # Every num_shards-th block: shards differ by one block at most, and share the short last blocks.
            blocks = list(range(number, table.num_blocks, num_shards))
            options = {"name": f"{name}-{number}", "num_cpus": 0}
            self.actors.append(actors.start(BlockShard, options, table, blocks))

    def broadcast(self, function: Callable[..., T], *arguments: object) -> list[T]:
        """Call `function(shard, *arguments)` in every shard's process, and return the answers in the shards' order.

        Raises:
            StageTimeout: a shard gave no answer.
            ray.exceptions.RayActorError: a shard died; the selection must start again.
        """
        meters.CORESET_ROUNDS.add()
        # Put once into the object store, an argument travels once to each node and not once to each shard.
        shared = [ray.put(argument) for argument in arguments]
        calls = [actor.apply.remote(function, *shared) for actor in self.actors]
        try:
            return ray.get(calls, timeout=ROUND_TIMEOUT_S)
        except GetTimeoutError:
            raise StageTimeout(f"coreset shards: no answer to {function.__name__} in {ROUND_TIMEOUT_S:.0f} s") from None

    def stop(self) -> None:
        """End all shards."""
        for actor in self.actors:
            actors.kill(actor, no_restart=True)
