"""The coreset service: actors that each own the embeddings of some blocks. The driver sees ids and candidates only."""

from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import ray
from ray.exceptions import GetTimeoutError

from rayrl.algorithms.selection import CoresetShard
from rayrl.data.blocks import BlockTable
from rayrl.errors import StageTimeout
from rayrl.metrics import meters

T = TypeVar("T")
ROUND_TIMEOUT_S = 600.0


def vectors_of(table: pa.Table) -> tuple[np.ndarray, np.ndarray]:
    """(ordinals, vectors) of an embeddings table; (n,) int64 and (n, d) float32."""
    ordinals = table["ordinal"].to_numpy()
    vectors = table["vector"].combine_chunks()
    return ordinals, vectors.flatten().to_numpy(zero_copy_only=False).reshape(len(ordinals), -1)


class BlockShard(CoresetShard):
    """A shard that reads its blocks itself: killed and restarted, it only has to be asked again from the start."""

    def __init__(self, table: BlockTable, blocks: list[int]):
        parts = [vectors_of(part) for part in map(table.read, blocks) if part.num_rows]
        super().__init__(np.concatenate([ids for ids, _ in parts]), np.concatenate([v for _, v in parts]))


class RayShards:
    """All shards of a pool as Ray actors."""

    def __init__(self, name: str, table: BlockTable, num_shards: int):
        num_shards = min(num_shards, table.num_blocks)
        self.actors: list[Any] = [
            ray.remote(BlockShard)
            .options(name=f"{name}-{i}", num_cpus=0)
            .remote(table, list(range(i, table.num_blocks, num_shards)))
            for i in range(num_shards)
        ]

    def broadcast(self, method: Callable[..., T], *arguments: Any) -> list[T]:
        """Call a method of `CoresetShard` on every shard.

        Raises:
            StageTimeout: a shard gave no answer.
            ray.exceptions.RayActorError: a shard died; select again from the start.
        """
        meters.CORESET_ROUNDS.add()
        shared = [ray.put(argument) for argument in arguments]
        calls = [actor.__getattr__(method.__name__).remote(*shared) for actor in self.actors]
        try:
            return ray.get(calls, timeout=ROUND_TIMEOUT_S)
        except GetTimeoutError:
            raise StageTimeout(f"coreset shards: no answer to {method.__name__} in {ROUND_TIMEOUT_S:.0f} s") from None

    def stop(self) -> None:
        for actor in self.actors:
            ray.kill(actor)
