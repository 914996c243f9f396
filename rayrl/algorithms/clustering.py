"""Which of a prompt's responses say the same: bidirectional entailment, or cosine similarity as its cheap stand-in.

Entailment is a label per ordered pair from a natural-language-inference model trained on MNLI; running that model, and
what it reads (`question + answer` on both sides in the releases below), is the caller's business.

Saying the same is not transitive, so what a cluster is depends on the definition and on the order of the responses.
RLP (arXiv 2403.19279) cites Kuhn et al. (arXiv 2302.09664), whose paper and release disagree, and does not say which of
them it ran. Equal responses should be compared once: cluster `distinct(texts)` and index the ids with its inverse.
"""

from collections.abc import Sequence
from typing import Literal

import numpy as np
from jaxtyping import Bool, Float, Int, Int64

CONTRADICTION, NEUTRAL, ENTAILMENT = 0, 1, 2
"""MNLI labels in the order of microsoft/deberta-large-mnli; other models may number them otherwise."""

Definition = Literal["strict", "kuhn2023", "farquhar2024"]


def distinct(texts: Sequence[str]) -> tuple[list[str], Int64[np.ndarray, " n"]]:
    """The m different texts in order of first appearance, and for each of the n texts its index among them."""
    index = {text: i for i, text in enumerate(dict.fromkeys(texts))}
    return list(index), np.array([index[text] for text in texts], np.int64)


def entailment_clusters(labels: Int[np.ndarray, "n n"], definition: Definition) -> Int64[np.ndarray, " n"]:
    """Cluster n texts by the labels between them; ids are 0, 1, ... in order of first appearance.

    "strict": Algorithm 1 of arXiv 2302.09664. Two texts are equivalent if each entails the other; a text joins the
    first cluster whose seed, that is first member, it is equivalent to, or starts one.
    "kuhn2023": that paper's release. Equivalent unless either direction is a contradiction, so two neutral directions
    merge; every text, not just seeds, hands its cluster to all later equivalents, and the last to do so wins. (The
    release orders the texts by a Python set, differently in every process; here the caller's order counts.)
    "farquhar2024": release of Farquhar et al., doi 10.1038/s41586-024-07421-0. Equivalent if no direction is a
    contradiction and not both are neutral; a text goes to the last earlier seed it is equivalent to.

    Args:
        labels: `labels[i, j]` is the label of premise i and hypothesis j: 0 contradiction, 1 neutral, 2 entailment.
            The diagonal is not read. Every definition gives the transposed matrix the same clusters.
        definition: What counts as equivalent, and who hands on a cluster.
    """
    low, high = np.minimum(labels, labels.T), np.maximum(labels, labels.T)
    match definition:
        case "strict":
            return _join_seeds(low == ENTAILMENT, "first")
        case "kuhn2023":
            return _join_last(low > CONTRADICTION)
        case "farquhar2024":
            return _join_seeds((low > CONTRADICTION) & (high == ENTAILMENT), "last")


def embedding_clusters(vectors: Float[np.ndarray, "n d"], threshold: float) -> Int64[np.ndarray, " n"]:
    """Cluster n embedded texts: each joins the first cluster to whose seed its cosine is at least `threshold`.

    Without such a seed it becomes one: the strict rule above with another equivalence, and the same ids. Ours, for
    prompts where n (n - 1) inferences cost too much. Cosines are rounded, so a threshold of 1 need not merge even
    equal vectors.
    """
    vectors = np.asarray(vectors, np.float64)
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    unit = vectors / np.maximum(norms, np.finfo(np.float64).tiny)  # a zero vector resembles nothing
    return _join_seeds(unit @ unit.T >= threshold, "first")


def _join_seeds(equivalent: Bool[np.ndarray, "n n"], match: Literal["first", "last"]) -> Int64[np.ndarray, " n"]:
    """Each text joins the first, or last, cluster whose seed it is equivalent to, or becomes a seed."""
    seeds: list[int] = []
    ids = np.empty(len(equivalent), np.int64)
    for text, row in enumerate(equivalent):
        clusters = np.flatnonzero(row[seeds])
        if len(clusters):
            ids[text] = clusters[0 if match == "first" else -1]
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
    return np.unique(ids, return_inverse=True)[1]
