"""Embedding replica: one pooled vector per text, and a scalar head's value of it. A Ray actor's plain class.

The head is applied outside the engine, so that one embedding engine serves the selection and any scalar evaluator.
"""

import asyncio
import uuid
from pathlib import Path
from typing import Any

import numpy as np

from rayrl.engines.vllm_engine import ServedEngine
from rayrl.metrics import meters
from rayrl.records import Checkpoint
from rayrl.runs.storage import local_folder

HEAD_FILE = "head/head.safetensors"
"""Beside the model folder's own files: vLLM loads every safetensors file at the top of it."""


class Embedder(ServedEngine):
    """One vLLM pooling engine."""

    async def embed(self, checkpoint: Checkpoint, inputs: list[list[int]]) -> np.ndarray:
        """Pooled hidden states of the last layer, (num_inputs, hidden_size) float32."""
        meters.TOKENS.add(sum(map(len, inputs)), **self.labels, kind="prompt")
        async with self.serving(checkpoint):
            return np.stack(await asyncio.gather(*(self._embed(tokens) for tokens in inputs)))

    async def values(self, checkpoint: Checkpoint, inputs: list[list[int]]) -> np.ndarray:
        """The scalar head's value of each input, (num_inputs,) float64."""
        return apply_head(await self.embed(checkpoint, inputs), checkpoint)

    async def probe(self, expected: dict[str, Any], checkpoint: Checkpoint) -> float:
        vector = await self._embed(expected["prompt_token_ids"])
        if "value" not in expected:  # a policy, which has no head
            theirs = np.array(expected["embedding"][self.spec.pooling])
            return float(np.abs(vector[: len(theirs)] - theirs).max())
        return float(abs(apply_head(vector[None], checkpoint)[0] - expected["value"]))

    async def _embed(self, token_ids: list[int]) -> np.ndarray:
        from vllm import PoolingParams

        request = {"prompt_token_ids": token_ids}
        params = PoolingParams(task="embed", use_activation=False)
        (output,) = [o async for o in self.engine.encode(request, params, request_id=uuid.uuid4().hex)]
        return output.outputs.data.float().numpy()


def apply_head(vectors: np.ndarray, checkpoint: Checkpoint) -> np.ndarray:
    """The head's value w . h + b of vectors h, (num, hidden_size) -> (num,)."""
    from safetensors.numpy import load_file

    head = load_file(Path(local_folder(checkpoint.path)) / HEAD_FILE)
    return vectors.astype(np.float64) @ head["weight"].astype(np.float64)[0] + float(head["bias"][0])
