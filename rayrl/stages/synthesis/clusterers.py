"""Which of a prompt's sampled responses say the same: by an entailment model, or by their embeddings.

The entailment model reads `question answer` on both sides, as in both releases the definitions come from; what Kuhn et
al. write as one text with " [SEP] " inside is given here as a pair, which the model's own tokenizer joins. Embeddings
are of the answers alone: the prompt they share would only make them more alike.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any, Protocol

import numpy as np
from jaxtyping import Bool, Int, Int64

from rayrl.algorithms.clustering import (
    CONTRADICTION,
    ENTAILMENT,
    Definition,
    embedding_clusters,
    entailment_clusters,
)
from rayrl.data.tokenizing import encode_prompt
from rayrl.engines.entailment import Entailments, Pair
from rayrl.fleets.fleet import Fleet
from rayrl.fleets.services import Services
from rayrl.records import Checkpoint
from rayrl.runs.run import Run
from rayrl.stages.selection.embedding import Embedding, embedding_of

PAIRS_PER_CALL = 256
"""Pairs in one call: a replica that dies loses no more work than that."""


@dataclass(frozen=True, kw_only=True)
class Found:
    """The clusters of one prompt's different texts, and what they cost."""

    ids: Int64[np.ndarray, " texts"]
    num_calls: int = 0
    num_truncated: int = 0


class Clusterer(Protocol):
    """Finds the clusters of several prompts' texts at once; travels to the tasks that cluster blocks."""

    def find(self, prompts: Sequence[str], texts: Sequence[list[str]]) -> list[Found]: ...


@dataclass(frozen=True, kw_only=True)
class ByEntailment:
    """Clusters of bidirectional entailment."""

    fleet: Fleet
    definition: Definition

    def find(self, prompts: Sequence[str], texts: Sequence[list[str]]) -> list[Found]:
        """One direction of every pair is asked first, and the other where it can still matter."""
        said = [[f"{prompt} {text}" for text in of_prompt] for prompt, of_prompt in zip(prompts, texts, strict=True)]
        return label_clusters(self._ask, said, self.definition)

    def _ask(self, pairs: list[Pair]) -> Entailments:
        calls = [pairs[start : start + PAIRS_PER_CALL] for start in range(0, len(pairs), PAIRS_PER_CALL)]
        answers = [self.fleet.call("classify", call) for call in calls or [[]]]
        return Entailments(
            labels=np.concatenate([answer.labels for answer in answers]),
            asked=np.concatenate([answer.asked for answer in answers]),
            truncated=np.concatenate([answer.truncated for answer in answers]),
        )


@dataclass(frozen=True, kw_only=True)
class ByEmbedding:
    """Clusters of cosine similarity."""

    embedding: Embedding
    threshold: float

    def find(self, prompts: Sequence[str], texts: Sequence[list[str]]) -> list[Found]:
        """All texts of the block are embedded in one call."""
        del prompts
        tokenizer = self.embedding.tokenizer()
        own = self.embedding.select.embedder == "policy"
        tokens = [encode_prompt(tokenizer, t, "plain") if own else tokenizer.encode(t) for of in texts for t in of]
        vectors = self.embedding.vectors(tokens)
        stops = np.cumsum([len(of_prompt) for of_prompt in texts])
        return [Found(ids=embedding_clusters(part, self.threshold)) for part in np.split(vectors, stops[:-1])]


def label_clusters(
    ask: Callable[[list[Pair]], Entailments], texts: Sequence[list[str]], definition: Definition
) -> list[Found]:
    """The clusters of several prompts' texts, given who labels pairs of texts."""
    places = [(p, i, j) for p, of_prompt in enumerate(texts) for i, j in combinations(range(len(of_prompt)), 2)]
    forward = ask([(texts[p][i], texts[p][j]) for p, i, j in places])
    is_open = undecided(forward.labels, definition)
    back = [(p, j, i) for (p, i, j), is_asked in zip(places, is_open, strict=True) if is_asked]
    backward = ask([(texts[p][j], texts[p][i]) for p, j, i in back])
    matrices = [np.zeros((len(of_prompt), len(of_prompt)), np.int8) for of_prompt in texts]
    num_calls, num_truncated = np.zeros((2, len(texts)), np.int64)
    for (p, i, j), label in zip(places, forward.labels, strict=True):
        matrices[p][i, j] = matrices[p][j, i] = label
    for (p, j, i), label in zip(back, backward.labels, strict=True):
        matrices[p][j, i] = label
    prompts = np.array([p for p, _, _ in [*places, *back]], np.int64)
    np.add.at(num_calls, prompts, np.append(forward.asked, backward.asked))
    np.add.at(num_truncated, prompts, np.append(forward.truncated, backward.truncated))
    return [
        Found(ids=entailment_clusters(m, definition), num_calls=int(calls), num_truncated=int(cut))
        for m, calls, cut in zip(matrices, num_calls, num_truncated, strict=True)
    ]


def undecided(labels: Int[np.ndarray, " pairs"], definition: Definition) -> Bool[np.ndarray, " pairs"]:
    """Whether two texts can still be equivalent, given the label of one direction."""
    return labels == ENTAILMENT if definition == "strict" else labels != CONTRADICTION


def make_clusterer(run: Run, services: Services, m1: Checkpoint, clustering: Any) -> tuple[Clusterer, Fleet]:
    """Who clusters, and the fleet that serves it."""
    spg = run.config.refresh.spg
    if clustering != "embedding":
        fleet = services.ready(services.entailment(spg))
        return ByEntailment(fleet=fleet, definition=clustering), fleet
    select = run.config.select.model_copy(update={"embedder": spg.embedder or "policy", "normalize": True})
    embedding = embedding_of(replace(run, config=run.config.model_copy(update={"select": select})), services, m1)
    return ByEmbedding(embedding=embedding, threshold=spg.threshold), embedding.fleet
