"""Simulated engines: replicas without a model, whose requests take a set time and whose answers follow from the input.

Use them to rehearse a run, to test what happens when parts of it die, and to measure what everything around the engines
costs. `SimulatedGenerator` has the methods of `rayrl.engines.generator.Generator`, and `SimulatedEmbedder` those of
`rayrl.engines.embedder.Embedder`. `rayrl.fleets.simulated.SimulatedServices` starts fleets of them in a run:

    services = SimulatedServices(run, mode="overlap", reference="generation")
    fleet = services.ready(services.generators(checkpoint))

Time. A replica works on `max_num_seqs` requests at once; further ones wait, first come, first served. Three numbers in
the config's `engine_args` (`generators.engine_args={request_s=0.2}`) say how long things take, in seconds:

    request_s   one request: a response, a judgement, a log-probability or a vector     0.5
    start_s     the start of a replica                                                  0
    swap_s      a swap of weights                                                       0.05

Answers. A response depends on the prompt's tokens, the seed and the weights' version, so a run can be repeated, and two
versions answer differently; a vector depends on its tokens only. The texts are words without meaning.

Limits. A swap loads nothing and checks nothing: any checkpoint's path will do. Weights do not come from a trainer's
group (`join` and `receive` refuse). Responses show no effect of a training.
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
from rayrl.engines.serving import LOADING, EngineStatus, Serving
from rayrl.engines.start import EngineSpec
from rayrl.engines.weight_sums import Sums
from rayrl.records import Checkpoint

NO_TRANSFER = 'ppo.weight_transfer must be "auto" or "folder" with simulated engines, got "nccl"; leave it out'
SETTINGS: dict[str, float] = {"request_s": 0.5, "start_s": 0.0, "swap_s": 0.05}
"""Entries of `engine_args` that are read, and their values where they are left out."""
DIMENSION = 64
"""Coordinates of an embedding."""
FIRST_TOKEN = 100
"""Token of the first of `WORDS`; the others follow."""
WORDS = re.findall(
    r"\w+",
    "a and as at be but by can day do each for from get give good have he her his how if in into is it just know like "
    "look make many may more my new no not now of on one or other out people see she so some take than that the their "
    "them then there these they think this time to up use way we well what",
)
"""Words of the responses."""

# Embeddings are computed for this many inputs at a time, whose tokens' vectors then fit in a core's cache.
_INPUTS_PER_CHUNK = 128
_TOKEN_VECTORS = np.random.default_rng(0).standard_normal((4096, DIMENSION), np.float32)


class SimulatedEngine(Serving):
    """Counterpart of `rayrl.engines.vllm_engine.ServedEngine` without an engine."""

    def __init__(self, spec: EngineSpec):
        settings = SETTINGS | spec.config.engine_args
        super().__init__(spec.checkpoint.version)
        time.sleep(settings["start_s"])
        self.spec = spec
        self.start_s = settings["start_s"]
        self.started_at = time.time()
        self.swaps_s: list[float] = []
        self._request_s = settings["request_s"]
        self._swap_s = settings["swap_s"]
        # A heap with one time per slot: when the slot has finished all requests that it was given so far.
        self._free_at = [0.0] * spec.config.max_num_seqs

    async def status(self) -> EngineStatus:
        return {
            "version": self.version,
            "start_s": self.start_s,
            "started_at": self.started_at,
            "swaps_s": self.swaps_s,
            "num_received": 0,
            "text_difference": None,
            "pid": os.getpid(),
        }

    async def load(self, checkpoint: Checkpoint) -> None:
        await self.swap(checkpoint)

    async def swap(self, checkpoint: Checkpoint) -> None:
        self.version = f"{LOADING}{checkpoint.version}"
        await asyncio.sleep(self._swap_s)
        self.version = checkpoint.version
        self.swaps_s.append(self._swap_s)

    async def join(self, init_info: dict[str, Any], timeout_s: float) -> None:
        raise NotImplementedError(NO_TRANSFER)

    async def receive(
        self, checkpoint: Checkpoint, sums: Sums, update_info: dict[str, Any], in_flight: bool, timeout_s: float
    ) -> None:
        raise NotImplementedError(NO_TRANSFER)

    async def _spend_time(self, num_requests: int) -> None:
        """Take the time of so many requests, behind those that came before."""
        now = done_at = time.monotonic()
        for _ in range(num_requests):
            done_at = max(now, self._free_at[0]) + self._request_s
            heapq.heapreplace(self._free_at, done_at)
        await asyncio.sleep(done_at - now)


class SimulatedGenerator(SimulatedEngine):
    """Generation replica without a model: responses of 8 to 16 words, equal for equal seed, prompt and version."""

    async def generate(
        self, checkpoint: Checkpoint, prompts: list[list[int]], seeds: list[list[int]], sampling: Sampling
    ) -> list[list[Continuation]]:
        """Return one continuation per prompt and seed, cut at `sampling.max_tokens`; other settings have no effect."""
        async with self.serving(checkpoint):
            version = self.version
            await self._spend_time(sum(len(prompt_seeds) for prompt_seeds in seeds))
            continuations = []
            for prompt, prompt_seeds in zip(prompts, seeds, strict=True):
                samples = [_continuation(prompt, seed, sampling.max_tokens, version) for seed in prompt_seeds]
                continuations.append(samples)
            return continuations

    async def write(
        self, checkpoint: Checkpoint, prompts: list[list[int]], seeds: list[list[int]], sampling: Sampling
    ) -> list[list[Continuation]]:
        """Return the same as `generate`: the text holds no score, so a generative evaluator abstains."""
        return await self.generate(checkpoint, prompts, seeds, sampling)

    async def next_token_logprobs(
        self, checkpoint: Checkpoint, prompts: list[list[int]], token_ids: list[int]
    ) -> list[list[float]]:
        """Share all probability between the given tokens, in shares that follow from prompt and version."""
        async with self.serving(checkpoint):
            await self._spend_time(len(prompts))
            rows = []
            for prompt in prompts:
                shares = [1 + byte for byte in _digest(prompt, self.version, len(token_ids))]
                rows.append(np.log(np.array(shares) / sum(shares)).tolist())
            return rows

    async def logprobs(
        self, checkpoint: Checkpoint, prompts: list[list[int]], continuations: list[list[int]]
    ) -> list[float]:
        """Return the sums of the log-probabilities that `generate` gives these tokens, whatever the prompt."""
        async with self.serving(checkpoint):
            await self._spend_time(len(prompts))
            return [sum(map(_logprob, tokens)) for tokens in continuations]


class SimulatedEmbedder(SimulatedEngine):
    """Embedding replica without a model: the mean of fixed vectors of the tokens, (num_inputs, 64) float32."""

    async def embed(self, checkpoint: Checkpoint, inputs: list[list[int]]) -> np.ndarray:
        """Return a vector per input; the version has no effect."""
        async with self.serving(checkpoint):
            await self._spend_time(len(inputs))
            chunks = range(0, len(inputs), _INPUTS_PER_CHUNK)
            return np.concatenate([_vectors(inputs[start : start + _INPUTS_PER_CHUNK]) for start in chunks])

    async def values(self, checkpoint: Checkpoint, inputs: list[list[int]]) -> np.ndarray:
        """Return the values of a head that follows from the checkpoint's version, (num_inputs,) float64."""
        vectors = await self.embed(checkpoint, inputs)
        head = np.frombuffer(_digest([], checkpoint.version, DIMENSION), np.uint8) / 127.5 - 1
        return 2.5 + vectors.astype(np.float64) @ head


def _continuation(prompt: list[int], seed: int, max_tokens: int, version: str) -> Continuation:
    # The first byte of the digest draws the length, the others draw the words.
    length, *draws = _digest(prompt, f"{seed} {version}", 17)
    tokens = [FIRST_TOKEN + draw % len(WORDS) for draw in draws[: 8 + length % 9]]
    kept = tokens[:max_tokens]
    logprobs = [_logprob(token) for token in kept]
    return Continuation(
        text=" ".join(WORDS[token - FIRST_TOKEN] for token in kept),
        token_ids=kept,
        logprob=sum(logprobs),
        token_logprobs=logprobs,
        finish_reason="stop" if len(kept) == len(tokens) else "length",
        versions=[version],
        candidates=[],
    )


def _logprob(token: int) -> float:
    return -(1 + token % 16) / 8


def _digest(prompt: list[int], key: str, num_bytes: int) -> bytes:
    """Return up to 64 bytes that follow from the prompt and the key."""
    return blake2b(f"{prompt} {key}".encode(), digest_size=num_bytes).digest()


def _vectors(inputs: list[list[int]]) -> np.ndarray:
    lengths = np.fromiter(map(len, inputs), np.int64, len(inputs))
    tokens = np.fromiter(chain.from_iterable(inputs), np.int64, int(lengths.sum()))
    # All inputs' tokens lie in one array; each input's part of it, from its start on, is summed.
    starts = np.concatenate([[0], lengths.cumsum()[:-1]])
    sums = np.add.reduceat(_TOKEN_VECTORS[tokens % len(_TOKEN_VECTORS)], starts)
    return sums / lengths[:, None].astype(np.float32)
