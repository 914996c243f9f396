"""Preference pairs without a judgement: RLP's synthetic preference generation (arXiv 2403.19279, Sec. 4.2).

The meaning that most of a prompt's responses share is taken to be right, and the share of them is the confidence. Two
controls of the paper's Table 5 need no code here: gamma = 0 is its Select-All, and `pairing.best_worst` is ranking by
the reward model (of two responses there; of all n it is West-of-N, arXiv 2401.12086).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int


@dataclass(frozen=True, slots=True, kw_only=True)
class Synthesis:
    """Outcome for one prompt; without a pair, `chosen` and `rejected` are both None."""

    confidence: float
    """Share of the responses that the largest cluster holds, in (0, 1]."""
    num_clusters: int
    """Clusters of all responses."""
    chosen: int | None
    """Index of the preferred response."""
    rejected: int | None
    """Index of the other."""


def synthetic_pair(
    clusters: Sequence[int], rewards: Sequence[float | None], gamma: float, rng: np.random.Generator
) -> Synthesis:
    """Pair the largest cluster's best response with a random one from the other clusters.

    Chosen is the response of the largest cluster with the highest reward, the smaller index on a tie. Which of equally
    large clusters counts as the largest is unspecified in the paper; here it is the one that holds the highest reward.
    Rejected is drawn uniformly from the responses of all other clusters. A reward of None is an abstention: the
    response still counts towards its cluster's size, but takes part in no pair.

    There is no pair if the confidence is below gamma, if all responses are in one cluster (so at gamma = 1 there never
    is one), or if abstentions leave no response for either side. Nothing is drawn then.

    Args:
        clusters: The cluster id of each of the prompt's n responses (`rayrl.algorithms.clustering`).
        rewards: The reward of each, by the reward model that the policy was trained with.
        gamma: Least confidence that makes a pair, 0 to 1; 0.5 in the paper.
        rng: Draws the rejected response.

    Raises:
        ValueError: there are no responses, or clusters and rewards differ in number.
    """
    if not 0 < len(clusters) == len(rewards):
        raise ValueError(f"need a cluster and a reward per response, got {len(clusters)} and {len(rewards)}")
    # `members[i]` is the place of response i's cluster in `ids`, and `sizes` counts the responses of each cluster.
    ids, members, sizes = np.unique(clusters, return_inverse=True, return_counts=True)
    confidence = float(sizes.max() / len(clusters))
    chosen = rejected = None
    if confidence >= gamma:
        chosen, rejected = _draw(members, sizes, rewards, rng)
    return Synthesis(confidence=confidence, num_clusters=len(ids), chosen=chosen, rejected=rejected)


def _draw(
    members: Int[np.ndarray, " n"],
    sizes: Int[np.ndarray, " clusters"],
    rewards: Sequence[float | None],
    rng: np.random.Generator,
) -> tuple[int, int] | tuple[None, None]:
    """The (chosen, rejected) pair, given each response's cluster and the clusters' sizes."""
    scored = {i: reward for i, reward in enumerate(rewards) if reward is not None}
    in_a_largest = [i for i in scored if sizes[members[i]] == sizes.max()]
    if not in_a_largest:
        return None, None
    # Among several largest clusters, the highest reward of them all also decides which one counts as the largest.
    chosen = max(in_a_largest, key=lambda i: scored[i])
    in_other_clusters = [i for i in scored if members[i] != members[chosen]]
    if not in_other_clusters:
        return None, None
    return chosen, int(rng.choice(in_other_clusters))
