"""Entailment replica: does a premise entail a hypothesis, contradict it, or neither? A Ray actor's plain class."""

import logging
import os
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Int8

from rayrl.algorithms.batching import micro_batches
from rayrl.algorithms.clustering import ENTAILMENT
from rayrl.metrics import meters, prometheus
from rayrl.models.mnli import label_order, load_entailment

logger = logging.getLogger(__name__)

BATCH_TOKENS = {"cpu": 2048, "cuda": 32768}
"""Tokens, padding included, of one forward pass."""

MAX_CONCURRENCY = 10
"""Calls that a replica has at once. They are read one after the other, while it says how it is."""

Pair = tuple[str, str]
"""(premise, hypothesis)"""


@dataclass(frozen=True, kw_only=True)
class EntailmentSpec:
    """What a replica is started with."""

    path: str
    """A sequence classifier's folder or hub id."""
    max_tokens: int
    """Longest pair that is read whole; of a longer one the longer text loses its end first."""
    threads: int
    """Compute threads, without a GPU."""
    on_gpu: bool


@dataclass(frozen=True, kw_only=True)
class Entailments:
    """The answers to a list of pairs."""

    labels: Int8[np.ndarray, " pairs"]
    """0 contradiction, 1 neutral, 2 entailment."""
    asked: Bool[np.ndarray, " pairs"]
    """The model has read this pair. It has not read an equal one earlier in the list, nor are its two texts one."""
    truncated: Bool[np.ndarray, " pairs"]
    """It has read it without its ends."""


class EntailmentModel:
    """A sequence classifier on this replica's device: half precision on a GPU, else float32."""

    def __init__(self, spec: EntailmentSpec):
        import torch

        started = time.monotonic()
        self._turn = threading.Lock()
        self.labels = prometheus.replica()
        meters.RESTARTS.add(prometheus.was_restarted(), **self.labels)
        meters.show_state("starting", self.labels)
        if not spec.on_gpu:
            torch.set_num_threads(spec.threads)
        self._device = "cuda" if spec.on_gpu else "cpu"
        self._order = np.array(label_order(spec.path), np.int8)
        model, self._tokenizer = load_entailment(spec.path, torch.float16 if spec.on_gpu else torch.float32)
        self._model = model.to(self._device)
        context = self._model.config.to_dict().get("max_position_embeddings") or spec.max_tokens
        self._max_tokens = min(spec.max_tokens, context, self._tokenizer.model_max_length)
        if self._max_tokens < spec.max_tokens:
            logger.warning("%s reads %d tokens, not max_tokens = %d", spec.path, self._max_tokens, spec.max_tokens)
        self.start_s = time.monotonic() - started
        self.started_at = time.time()
        meters.START_SECONDS.set(self.start_s, **self.labels)
        meters.show_state("serving", self.labels)

    def status(self) -> dict[str, Any]:
        """Start-up seconds of this replica, whose weights never change; also the health check."""
        return {"start_s": self.start_s, "started_at": self.started_at, "swaps_s": [], "pid": os.getpid()}

    def classify(self, pairs: Sequence[Pair]) -> Entailments:
        """A label per pair. Each distinct pair is read once, and two equal texts entail each other unread."""
        distinct = {pair: n for n, pair in enumerate(dict.fromkeys(p for p in pairs if p[0] != p[1]))}
        with self._turn:
            labels, truncated = self._read(list(distinct))
        meters.ENTAILED.add(len(distinct), **self.labels)
        which = np.array([distinct.get(pair, -1) for pair in pairs], np.int64)
        asked = np.zeros(len(pairs), bool)
        asked[np.unique(which, return_index=True)[1]] = True
        asked &= which >= 0
        return Entailments(  # at -1 is the answer for equal texts
            labels=np.append(labels, np.int8(ENTAILMENT))[which],
            asked=asked,
            truncated=asked & np.append(truncated, False)[which],
        )

    def _read(self, pairs: list[Pair]) -> tuple[np.ndarray, np.ndarray]:
        """Label of each pair, and whether it lost its ends."""
        import torch

        labels, truncated = np.empty(len(pairs), np.int8), np.zeros(len(pairs), bool)
        if not pairs:
            return labels, truncated
        encoded = self._encode(pairs, truncation="longest_first", max_length=self._max_tokens)
        lengths = [len(tokens) for tokens in encoded["input_ids"]]
        full = [n for n, length in enumerate(lengths) if length == self._max_tokens]
        if full:
            whole = self._encode([pairs[n] for n in full], truncation=False, verbose=False)["input_ids"]
            truncated[full] = [len(tokens) > self._max_tokens for tokens in whole]
        for batch in micro_batches(lengths, BATCH_TOKENS[self._device]):
            rows = {name: [values[n] for n in batch] for name, values in encoded.items()}
            inputs = self._tokenizer.pad(rows, return_tensors="pt").to(self._device)
            with torch.inference_mode():
                labels[batch] = self._order[self._model(**inputs).logits.argmax(-1).cpu().numpy()]
        return labels, truncated

    def _encode(self, pairs: list[Pair], **options: Any) -> Any:
        return self._tokenizer([premise for premise, _ in pairs], [hypothesis for _, hypothesis in pairs], **options)
