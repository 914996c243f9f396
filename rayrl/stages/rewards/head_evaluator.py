"""An evaluator of heads: linear, on the vectors by which the selection tells responses apart.

No language model is trained: a fit takes seconds, and scoring is an embedding and a matrix product.
"""

import io
import time
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from rayrl.algorithms.heads import Heads, fit_heads, mean_and_spread
from rayrl.fleets.fleet import Fleet
from rayrl.fleets.services import Services
from rayrl.models.served_reward import Reasons
from rayrl.records import Judgement, ResponseKey, Scored
from rayrl.runs import storage
from rayrl.runs.stage_metrics import FitMetrics
from rayrl.stages.rewards.evaluator import Evaluator, Scorer
from rayrl.stages.selection.embedding import Embedding, embedding_of, input_of

HEADS = "heads.npz"


@dataclass(frozen=True, kw_only=True)
class HeadEvaluator(Evaluator):
    """The mean of an ensemble of heads on the selection's vectors."""

    def serve(self, services: Services) -> "HeadScorer":
        embedding = self._embedding(services)
        return HeadScorer(fleet=embedding.fleet, embedding=embedding, heads=self._load())

    def fit(
        self, services: Services, judgements: list[Judgement], token_ids: Mapping[ResponseKey, list[int]]
    ) -> FitMetrics:
        """Embed what was judged, fit the heads, and write them.

        Args:
            services: fleets.
            judgements: scored ones.
            token_ids: those of prompt and response of each.

        Returns:
            As of one step: the first loss is that of predicting the mean score, the last that of the heads on what they
            learnt.
        """
        started = time.monotonic()
        items = [Scored(prompt=j.prompt, response=j.response, token_ids=token_ids[j.response_key]) for j in judgements]
        vectors = vectors_of(self._embedding(services), items)
        scores = np.array([judgement.score for judgement in judgements], np.float64)
        groups = np.unique([judgement.prompt_id for judgement in judgements], return_inverse=True)[1]
        heads = fit_heads(vectors, scores, groups, num_heads=self.run.config.select.num_heads, seed=self.seed)
        sink = io.BytesIO()
        np.savez(sink, weights=heads.weights, bias=heads.bias, noise=heads.noise, ridge=heads.ridge)
        storage.write_bytes(storage.join(self.checkpoint.path, HEADS), sink.getvalue())
        predicted = mean_and_spread(heads.scores(vectors))[0]
        return FitMetrics(
            num_steps=1,
            first_loss=float(np.var(scores)),
            final_loss=float(np.mean((predicted - scores) ** 2)),
            fit_s=time.monotonic() - started,
        )

    def _embedding(self, services: Services) -> Embedding:
        select = self.run.config.select
        return embedding_of(self.run, services, self.m1, embedder=select.embedder, normalize=select.normalize)

    def _load(self) -> Heads:
        with np.load(io.BytesIO(storage.read_bytes(storage.join(self.checkpoint.path, HEADS)))) as file:
            return Heads(
                weights=file["weights"], bias=file["bias"], noise=float(file["noise"]), ridge=float(file["ridge"])
            )


@dataclass(frozen=True, kw_only=True)
class HeadScorer(Scorer):
    """Heads on the fleet that embeds for them."""

    fleet: Fleet
    embedding: Embedding
    heads: Heads

    def score(self, items: list[Scored], reasons: Reasons | None = None) -> list[float | None]:
        """Return the heads' mean score of each response. A text beyond the embedder's context is read up to there."""
        if not items:
            return []
        return list(mean_and_spread(self.heads.scores(vectors_of(self.embedding, items)))[0].tolist())


def vectors_of(embedding: Embedding, items: list[Scored]) -> np.ndarray:
    """Embed responses: (num_items, width) float32."""
    tokenizer = embedding.tokenizer() if embedding.needs_tokenizer else None
    return embedding.vectors(
        [input_of(embedding, tokenizer, item.prompt, item.response, item.token_ids) for item in items]
    )
