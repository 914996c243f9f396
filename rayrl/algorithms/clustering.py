"""Clusters of texts that mean the same: bidirectional entailment, or cosine similarity as its cheap stand-in.

Entailment is a label for each ordered pair of texts, from a natural-language-inference model trained on MNLI. Running
that model is left to the caller, and so is its input (`question + answer` on both sides in the releases below).

Equivalence of texts is not transitive, so a cluster depends on the definition and on the order of the texts. RLP (arXiv
2403.19279) cites Kuhn et al. (arXiv 2302.09664), whose paper and release disagree, and does not tell which of the two
it ran: every definition is here. Equal texts should be compared once: cluster `distinct(texts)` and index the ids with
its inverse.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Bool, Float, Int, Int64

CONTRADICTION, NEUTRAL, ENTAILMENT = 0, 1, 2
"""MNLI labels in the order of microsoft/deberta-large-mnli; other models may number them otherwise."""


def distinct(texts: Sequence[str]) -> tuple[list[str], Int64[np.ndarray, " n"]]:
    """The m different texts in order of first appearance, and for each of the n texts its index among them."""
    index: dict[str, int] = {}
    for text in texts:
        index.setdefault(text, len(index))
    inverse = np.array([index[text] for text in texts], np.int64)
    return list(index), inverse


def always_undecided(labels: Int[np.ndarray, " pairs"]) -> Bool[np.ndarray, " pairs"]:
    """Return a mask of all pairs, so that both directions of each are read: right for any definition, and slow."""
    return np.ones(len(labels), np.bool_)


@dataclass(frozen=True, slots=True, kw_only=True)
class Clustering:
    """A definition of clusters, and the input that it reads."""

    reads: Literal["entailment", "embedding"]
    find: Callable[..., Int64[np.ndarray, " n"]]
    """Cluster ids of n texts, 0, 1, ... in order of first appearance. Called as `find(labels)` with the labels of
    `entailment_clusters`, or as `find(vectors, threshold)` like `embedding_clusters`."""
    is_undecided: Callable[[Int[np.ndarray, " pairs"]], Bool[np.ndarray, " pairs"]] = always_undecided
    """Only for entailment: given the labels of one direction of some pairs, a mask of the pairs whose other direction
    can still change the clusters. The model need not read the other direction of the rest."""


def strict_clusters(labels: Int[np.ndarray, "n n"]) -> Int64[np.ndarray, " n"]:
    """Algorithm 1 of arXiv 2302.09664: two texts are equivalent if each entails the other.

    A text joins the first cluster to whose seed, that is first member, it is equivalent. Otherwise it starts one.
    """
    weaker, _ = _both_directions(labels)
    return _join_seeds(weaker == ENTAILMENT, "first")


def kuhn2023_clusters(labels: Int[np.ndarray, "n n"]) -> Int64[np.ndarray, " n"]:
    """The release of arXiv 2302.09664: equivalent unless either direction is a contradiction.

    Two neutral directions therefore merge. Every text, not just a seed, hands its cluster to all later equivalents, and
    the last to do so wins. (The release orders the texts by a Python set, differently in every process; here the
    caller's order counts.)
    """
    weaker, _ = _both_directions(labels)
    return _join_last(weaker > CONTRADICTION)


def farquhar2024_clusters(labels: Int[np.ndarray, "n n"]) -> Int64[np.ndarray, " n"]:
    """Release of Farquhar et al., doi 10.1038/s41586-024-07421-0.

    Two texts are equivalent if no direction is a contradiction and not both are neutral. A text joins the last cluster
    to whose seed it is equivalent.
    """
    weaker, stronger = _both_directions(labels)
    # Without a contradiction, the stronger label is entailment or both labels are neutral.
    return _join_seeds((weaker > CONTRADICTION) & (stronger == ENTAILMENT), "last")


def embedding_clusters(vectors: Float[np.ndarray, "n d"], threshold: float) -> Int64[np.ndarray, " n"]:
    """Cluster n embedded texts: each joins the first cluster to whose seed its cosine is at least `threshold`.

    Without such a seed it becomes one: the strict rule above with another equivalence, and the same ids. Ours, for
    prompts where n (n - 1) inferences cost too much. Cosines are rounded, so a threshold of 1 need not merge even
    equal vectors.
    """
    vectors = np.asarray(vectors, np.float64)
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)  # (n, 1)
    unit = vectors / np.maximum(norms, np.finfo(np.float64).tiny)  # a zero vector resembles no other
    cosines = unit @ unit.T  # (n, n)
    return _join_seeds(cosines >= threshold, "first")


def is_entailed(labels: Int[np.ndarray, " pairs"]) -> Bool[np.ndarray, " pairs"]:
    """Return which pairs the reverse direction still decides under "strict": those entailed in the direction given.

    "strict" asks for entailment in both directions, so any other label refuses the pair at once.
    """
    return labels == ENTAILMENT


def is_not_contradicted(labels: Int[np.ndarray, " pairs"]) -> Bool[np.ndarray, " pairs"]:
    """Return which pairs the reverse direction still decides under "kuhn2023" and "farquhar2024": those without a
    contradiction in the direction given.

    Both definitions refuse a pair that contradicts itself in either direction.
    """
    return labels != CONTRADICTION


CLUSTERINGS: dict[str, Clustering] = {
    "strict": Clustering(reads="entailment", find=strict_clusters, is_undecided=is_entailed),
    "kuhn2023": Clustering(reads="entailment", find=kuhn2023_clusters, is_undecided=is_not_contradicted),
    "farquhar2024": Clustering(reads="entailment", find=farquhar2024_clusters, is_undecided=is_not_contradicted),
    "embedding": Clustering(reads="embedding", find=embedding_clusters),
}
"""Values of `refresh.spg.clustering`. Config, plan and synthesis learn of a definition from its entry."""


def entailment_clusters(labels: Int[np.ndarray, "n n"], definition: str) -> Int64[np.ndarray, " n"]:
    """Cluster n texts by the labels between them; ids are 0, 1, ... in order of first appearance.

    Args:
        labels: `labels[i, j]` is the label of premise i and hypothesis j: 0 contradiction, 1 neutral, 2 entailment.
            The diagonal is not read. Every definition here gives the transposed matrix the same clusters.
        definition: A name in `CLUSTERINGS` that reads entailment.
    """
    return CLUSTERINGS[definition].find(labels)


def _both_directions(labels: Int[np.ndarray, "n n"]) -> tuple[Int[np.ndarray, "n n"], Int[np.ndarray, "n n"]]:
    """The weaker and the stronger label of each pair's two directions; entailment is the strongest."""
    return np.minimum(labels, labels.T), np.maximum(labels, labels.T)


def _join_seeds(equivalent: Bool[np.ndarray, "n n"], match: Literal["first", "last"]) -> Int64[np.ndarray, " n"]:
    """Each text joins the first, or last, cluster whose seed it is equivalent to, or becomes a seed."""
    seeds: list[int] = []  # the seed of cluster 0, of cluster 1, ...
    ids = np.empty(len(equivalent), np.int64)
    for text, row in enumerate(equivalent):
        matching_clusters = np.flatnonzero(row[seeds])
        if len(matching_clusters):
            ids[text] = matching_clusters[0 if match == "first" else -1]
        else:
            ids[text] = len(seeds)
            seeds.append(text)
    return ids


def _join_last(equivalent: Bool[np.ndarray, "n n"]) -> Int64[np.ndarray, " n"]:
    """Each text joins the cluster of the last equivalent text before it, seed or not."""
    ids = np.arange(len(equivalent))
    for text, row in enumerate(equivalent):
        earlier = np.flatnonzero(row[:text])
        if len(earlier):
            ids[text] = ids[earlier[-1]]
    # So far a cluster has the index of its first text as its id: number them 0, 1, ... in the same order.
    return np.unique(ids, return_inverse=True)[1]
