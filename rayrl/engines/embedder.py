"""Embedding replica: one pooled vector per text, and the value that a scalar head gives it. A Ray actor's plain class.

The head is applied outside of the engine, so that one embedding engine serves the selection and any scalar evaluator.
"""

import asyncio
import uuid
from pathlib import Path

import numpy as np

from rayrl.engines.vllm_engine import ServedEngine
from rayrl.engines.weight_folder import TextReading
from rayrl.metrics import meters
from rayrl.records import Checkpoint
from rayrl.runs.storage import local_folder

HEAD_FILE = "head/head.safetensors"
"""In a folder below the model folder's own files: vLLM loads every safetensors file at the top of it."""


class Embedder(ServedEngine):
    """One vLLM pooling engine."""

    async def embed(self, checkpoint: Checkpoint, inputs: list[list[int]]) -> np.ndarray:
        """Return pooled hidden states of the last layer, (num_inputs, hidden_size) float32."""
        num_tokens = sum(len(tokens) for tokens in inputs)
        meters.TOKENS.add(num_tokens, **self.labels, kind="prompt")
        async with self.serving(checkpoint):
            vectors = await asyncio.gather(*(self._embed(tokens) for tokens in inputs))
            return np.stack(vectors)

    async def values(self, checkpoint: Checkpoint, inputs: list[list[int]]) -> np.ndarray:
        """Return the scalar head's value of each input, (num_inputs,) float64."""
        return apply_head(await self.embed(checkpoint, inputs), checkpoint)

    async def _read_text(self, text: TextReading, checkpoint: Checkpoint) -> float | None:
        if "value" not in text or len(text["token_ids"]) > self.engine.model_config.max_model_len:
            return None
        vector = await self._embed(text["token_ids"])
        return float(abs(apply_head(vector[None], checkpoint)[0] - text["value"]))

    async def _embed(self, token_ids: list[int]) -> np.ndarray:
        from vllm import PoolingParams

        params = PoolingParams(task="embed", use_activation=False)
        stream = self.engine.encode({"prompt_token_ids": token_ids}, params, request_id=uuid.uuid4().hex)
        (output,) = [item async for item in stream]
        return output.outputs.data.float().numpy()


def apply_head(vectors: np.ndarray, checkpoint: Checkpoint) -> np.ndarray:
    """Return the head's value w . h + b of vectors h, (num, hidden_size) -> (num,), in float64."""
    from safetensors.numpy import load_file

    head = load_file(Path(local_folder(checkpoint.path)) / HEAD_FILE)
    weight = head["weight"].astype(np.float64)[0]
    return vectors.astype(np.float64) @ weight + float(head["bias"][0])
