"""Entailment replica: labels pairs of texts as entailment, neutral or contradiction. A Ray actor's plain class.

The model is a sequence classifier trained on MNLI, run by transformers and not by vLLM. Its weights never change.
"""

import logging
import os
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Bool, Int8

from rayrl.algorithms.batching import padded_batches
from rayrl.algorithms.clustering import ENTAILMENT
from rayrl.data.tokenizing import as_ordinary_text
from rayrl.engines.serving import ReplicaStatus
from rayrl.metrics import meters, prometheus
from rayrl.models.mnli import label_order, load_entailment

if TYPE_CHECKING:
    from transformers import BatchEncoding

logger = logging.getLogger(__name__)

BATCH_TOKENS = {"cpu": 2048, "cuda": 32768}
"""Tokens, padding included, in one forward pass."""

MAX_CONCURRENCY = 10
"""Calls that a replica accepts at once. It classifies one call after the other; the rest is room for health checks."""

Pair = tuple[str, str]
"""(premise, hypothesis)"""


@dataclass(frozen=True, kw_only=True)
class EntailmentSpec:
    """Specification of an entailment replica."""

    path: str
    """A sequence classifier's folder or hub id."""
    max_tokens: int
    """Longest pair that is read whole. A longer one is cut, at the end of its longer text first."""
    threads: int
    """Compute threads, without a GPU."""
    on_gpu: bool


@dataclass(frozen=True, kw_only=True)
class Entailments:
    """The answers to a list of pairs."""

    labels: Int8[np.ndarray, " pairs"]
    """0 contradiction, 1 neutral, 2 entailment."""
    asked: Bool[np.ndarray, " pairs"]
    """Whether the model read this pair. It reads no pair of equal texts, and of equal pairs only the first."""
    truncated: Bool[np.ndarray, " pairs"]
    """Whether the model read the pair without the ends of its texts."""


class EntailmentModel:
    """A sequence classifier on this replica's device: half precision on a GPU, else float32."""

    def __init__(self, spec: EntailmentSpec):
        import torch

        started = time.monotonic()
        self._classify_lock = threading.Lock()
        self.labels = prometheus.replica()
        meters.RESTARTS.add(prometheus.was_restarted(), **self.labels)
        meters.show_state("starting", self.labels)
        if not spec.on_gpu:
            torch.set_num_threads(spec.threads)
        self._device = "cuda" if spec.on_gpu else "cpu"
        self._order = np.array(label_order(spec.path), np.int8)
        model, self._tokenizer = load_entailment(spec.path, torch.float16 if spec.on_gpu else torch.float32)
        # transformers wraps `Module.to` in a function without its types.
        self._model = model.to(self._device)  # pyright: ignore[reportArgumentType]
        context = self._model.config.to_dict().get("max_position_embeddings") or spec.max_tokens
        self._max_tokens = min(spec.max_tokens, context, self._tokenizer.model_max_length)
        if self._max_tokens < spec.max_tokens:
            logger.warning("%s reads %d tokens, not max_tokens = %d", spec.path, self._max_tokens, spec.max_tokens)
        self.start_s = time.monotonic() - started
        self.started_at = time.time()
        meters.START_SECONDS.set(self.start_s, **self.labels)
        meters.show_state("serving", self.labels)

    def status(self) -> ReplicaStatus:
        """Report the start-up; also the health check."""
        return {"start_s": self.start_s, "started_at": self.started_at, "swaps_s": [], "pid": os.getpid()}

    def classify(self, pairs: Sequence[Pair]) -> Entailments:
        """Label every pair. Each distinct pair is read once; two equal texts entail each other and are not read."""
        distinct: dict[Pair, int] = {}
        for premise, hypothesis in pairs:
            if premise != hypothesis:
                distinct.setdefault((premise, hypothesis), len(distinct))
        with self._classify_lock:
            labels, truncated = self._read(list(distinct))
        meters.ENTAILED.add(len(distinct), **self.labels)
        # Position of each pair's answer among those of the distinct pairs. At position -1, the last one, the answer
        # for equal texts is appended.
        positions = np.array([distinct.get(pair, -1) for pair in pairs], np.int64)
        first_of_each = np.unique(positions, return_index=True)[1]
        asked = np.zeros(len(pairs), bool)
        asked[first_of_each] = True
        asked &= positions >= 0
        return Entailments(
            labels=np.append(labels, np.int8(ENTAILMENT))[positions],
            asked=asked,
            truncated=asked & np.append(truncated, False)[positions],
        )

    def _read(self, pairs: list[Pair]) -> tuple[Int8[np.ndarray, " pairs"], Bool[np.ndarray, " pairs"]]:
        """Run the model; returns the label of each pair, and whether the pair was cut."""
        import torch

        labels, truncated = np.empty(len(pairs), np.int8), np.zeros(len(pairs), bool)
        if not pairs:
            return labels, truncated
        encoded = self._encode(pairs)
        lengths = [len(tokens) for tokens in encoded["input_ids"]]
        # A pair that fills the limit was either cut or fits exactly: only encoding it whole tells which.
        full = [number for number, length in enumerate(lengths) if length == self._max_tokens]
        if full:
            whole = self._encode([pairs[number] for number in full], cut=False)["input_ids"]
            truncated[full] = [len(tokens) > self._max_tokens for tokens in whole]
        for batch in padded_batches(lengths, BATCH_TOKENS[self._device]):
            rows = {name: [values[number] for number in batch] for name, values in encoded.items()}
            inputs = self._tokenizer.pad(rows, return_tensors="pt").to(self._device)
            with torch.inference_mode():
                outputs = self._model(**inputs).logits.argmax(-1).cpu().numpy()
            labels[batch] = self._order[outputs]
        return labels, truncated

    def _encode(self, pairs: list[Pair], *, cut: bool = True) -> "BatchEncoding":
        # A separator inside a text would make two texts of it.
        premises = [as_ordinary_text(self._tokenizer, premise) for premise, _ in pairs]
        hypotheses = [as_ordinary_text(self._tokenizer, hypothesis) for _, hypothesis in pairs]
        if cut:
            return self._tokenizer(
                premises,
                hypotheses,
                split_special_tokens=True,
                truncation="longest_first",
                max_length=self._max_tokens,
            )
        return self._tokenizer(premises, hypotheses, split_special_tokens=True, truncation=False, verbose=False)
