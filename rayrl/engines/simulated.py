"""Simulated engines: no model. Requests take a set time, and an answer is a function of seed and prompt.

They stand in for the vLLM replicas where everything around those is measured or put to the test: `SimulatedGenerator`
and `SimulatedEmbedder` offer what `rayrl.engines.generator.Generator` and `rayrl.engines.embedder.Embedder` offer, and
`SimulatedServices` starts fleets of them. A replica works on `max_num_seqs` requests at once, first come first served;
`engine_args` may say how long each takes (`request_s`), how long a start takes (`start_s`) and a swap (`swap_s`).
A swap loads nothing and is proved against nothing.
"""

import asyncio
import heapq
import os
import re
import time
from hashlib import blake2b
from itertools import chain
from typing import Any

import numpy as np

from rayrl.engines.generator import Continuation, Sampling
from rayrl.engines.serving import LOADING, Serving
from rayrl.engines.vllm_engine import EngineSpec
from rayrl.records import Checkpoint

DIMENSION = 64
"""Of the embeddings."""
FIRST_TOKEN = 100
WORDS = re.findall(
    r"\w+",
    "a and as at be but by can day do each for from get give good have he her his how if in into is it just know like "
    "look make many may more my new no not now of on one or other out people see she so some take than that the their "
    "them then there these they think this time to up use way we well what",
)
"""What token FIRST_TOKEN + n says, n below 70."""
_CHUNK = 128  # inputs whose tokens' vectors stay in a core's cache
_TOKEN_VECTORS = np.random.default_rng(0).standard_normal((4096, DIMENSION), np.float32)


class SimulatedEngine(Serving):
    """What `ServedEngine` is, without an engine."""

    def __init__(self, spec: EngineSpec):
        settings: dict[str, float] = {"request_s": 0.5, "start_s": 0.0, "swap_s": 0.05} | spec.config.engine_args
        super().__init__(spec.checkpoint.version)
        time.sleep(settings["start_s"])
        self.spec = spec
        self.start_s = settings["start_s"]
        self.started_at = time.time()
        self.swaps_s: list[float] = []
        self._request_s, self._swap_s = settings["request_s"], settings["swap_s"]
        self._free_at = [0.0] * spec.config.max_num_seqs  # a heap: when each slot has done what was asked so far

    async def status(self) -> dict[str, Any]:
        return {
            "version": self.version,
            "start_s": self.start_s,
            "started_at": self.started_at,
            "swaps_s": self.swaps_s,
            "pid": os.getpid(),
        }

    async def load(self, checkpoint: Checkpoint) -> None:
        await self.swap(checkpoint)

    async def swap(self, checkpoint: Checkpoint, *, reset_cache: bool = True) -> None:
        self.version = f"{LOADING}{checkpoint.version}"
        await asyncio.sleep(self._swap_s)
        self.version = checkpoint.version
        self.swaps_s.append(self._swap_s)

    async def join(self, init_info: dict[str, Any], timeout_s: float) -> None:
        raise NotImplementedError("simulated engines take their weights by name")

    async def receive(
        self, checkpoint: Checkpoint, probe: dict[str, Any], update_info: Any, in_flight: bool, timeout_s: float
    ) -> None:
        raise NotImplementedError("simulated engines take their weights by name")

    async def probe(self, expected: dict[str, Any], checkpoint: Checkpoint) -> float:
        return 0.0

    async def _requests(self, num: int) -> None:
        """Take the time that so many requests take, behind those that came before."""
        now = done_at = time.monotonic()
        for _ in range(num):
            done_at = max(now, self._free_at[0]) + self._request_s
            heapq.heapreplace(self._free_at, done_at)
        await asyncio.sleep(done_at - now)


class SimulatedGenerator(SimulatedEngine):
    """`Generator` without a model: 8 to 16 words a response, the same for equal seed and prompt."""

    async def generate(
        self, checkpoint: Checkpoint, prompts: list[list[int]], seeds: list[list[int]], sampling: Sampling
    ) -> list[list[Continuation]]:
        async with self.serving(checkpoint):
            version = self.version
            await self._requests(sum(map(len, seeds)))
            return [
                [_continuation(prompt, seed, sampling.max_tokens, version) for seed in of_prompt]
                for prompt, of_prompt in zip(prompts, seeds, strict=True)
            ]

    async def write(
        self, checkpoint: Checkpoint, prompts: list[list[int]], seeds: list[list[int]], sampling: Sampling
    ) -> list[list[Continuation]]:
        """Like `generate`: whoever looks for a score in it finds none."""
        return await self.generate(checkpoint, prompts, seeds, sampling)

    async def next_token_logprobs(
        self, checkpoint: Checkpoint, prompts: list[list[int]], token_ids: list[int]
    ) -> list[list[float]]:
        """The given tokens have all of the probability, in shares drawn by prompt and weights."""
        async with self.serving(checkpoint):
            await self._requests(len(prompts))
            shares = [[1 + b for b in _digest(prompt, self.version, len(token_ids))] for prompt in prompts]
            return [np.log(np.array(row) / sum(row)).tolist() for row in shares]

    async def logprobs(
        self, checkpoint: Checkpoint, prompts: list[list[int]], continuations: list[list[int]]
    ) -> list[float]:
        async with self.serving(checkpoint):
            await self._requests(len(prompts))
            return [sum(map(_logprob, tokens)) for tokens in continuations]


class SimulatedEmbedder(SimulatedEngine):
    """`Embedder` without a model: the mean of fixed vectors of the tokens, (num_inputs, 64) float32."""

    async def embed(self, checkpoint: Checkpoint, inputs: list[list[int]]) -> np.ndarray:
        async with self.serving(checkpoint):
            await self._requests(len(inputs))
            return np.concatenate([_vectors(inputs[i : i + _CHUNK]) for i in range(0, len(inputs), _CHUNK)])

    async def values(self, checkpoint: Checkpoint, inputs: list[list[int]]) -> np.ndarray:
        """A head drawn by the checkpoint's version, (num_inputs,) float64."""
        vectors = await self.embed(checkpoint, inputs)
        head = np.frombuffer(_digest([], checkpoint.version, DIMENSION), np.uint8) / 127.5 - 1
        return 2.5 + vectors.astype(np.float64) @ head


def _continuation(prompt: list[int], seed: int, max_tokens: int, version: str) -> Continuation:
    length, *draws = _digest(prompt, f"{seed} {version}", 17)
    tokens = [FIRST_TOKEN + draw % len(WORDS) for draw in draws[: 8 + length % 9]]
    said = tokens[:max_tokens]
    logprobs = [_logprob(token) for token in said]
    return Continuation(
        text=" ".join(WORDS[token - FIRST_TOKEN] for token in said),
        token_ids=said,
        logprob=sum(logprobs),
        token_logprobs=logprobs,
        finish_reason="stop" if len(said) == len(tokens) else "length",
        versions=[version],
        candidates=[],
    )


def _logprob(token: int) -> float:
    return -(1 + token % 16) / 8


def _digest(prompt: list[int], key: str, num: int) -> bytes:
    """Up to 64 bytes that are a function of the prompt and the key."""
    return blake2b(f"{prompt} {key}".encode(), digest_size=num).digest()


def _vectors(inputs: list[list[int]]) -> np.ndarray:
    lengths = np.fromiter(map(len, inputs), np.int64, len(inputs))
    tokens = np.fromiter(chain.from_iterable(inputs), np.int64, int(lengths.sum()))
    starts = np.concatenate([[0], lengths.cumsum()[:-1]])
    return np.add.reduceat(_TOKEN_VECTORS[tokens % len(_TOKEN_VECTORS)], starts) / lengths[:, None].astype(np.float32)
