"""Clusters of a prompt's responses that mean the same, by an entailment model or by embeddings, block by block.

The entailment model reads `question answer` on both sides, as in both releases the definitions come from. What Kuhn et
al. write as one text with " [SEP] " inside is given here as a pair, which the model's own tokenizer joins. Embeddings
are of the answers alone: the prompt they share would only make them more alike.

What makes two responses one cluster, given labels or vectors, is in `rayrl.algorithms.clustering`. A block's clusters
are kept once they are found.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import combinations
from typing import Protocol

import numpy as np
import pyarrow as pa
from jaxtyping import Int64

from rayrl.algorithms.clustering import CLUSTERINGS, distinct
from rayrl.data.blocks import BlockTable, map_blocks
from rayrl.data.tokenizing import encode_prompt, encode_text
from rayrl.engines.entailment import Entailments, Pair
from rayrl.fleets.fleet import Fleet
from rayrl.fleets.services import Services
from rayrl.records import Checkpoint, Sampled, from_table, to_table
from rayrl.runs.run import Run
from rayrl.runs.stage_metrics import EntailmentCosts
from rayrl.stages.selection.embedding import Embedding, embedding_of

PAIRS_PER_CALL = 256
"""Pairs in one call: a replica that dies loses no more work than that."""
COUNTS = ("num_pairs", "num_distinct_pairs", "num_calls", "num_truncated")
"""Columns of a clusters table that are added up."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Clustered:
    """One prompt's clusters: one row of a clusters table."""

    prompt_id: str
    clusters: list[int]
    """The cluster of each response."""
    num_pairs: int
    """Ordered pairs of its samples, repeats included."""
    num_distinct_pairs: int
    """Ordered pairs of different texts among them."""
    num_calls: int
    """Pairs the entailment model has read; the others were decided without it."""
    num_truncated: int
    """Pairs it has read without their ends."""


@dataclass(frozen=True, kw_only=True)
class TextClusters:
    """The clusters of one prompt's different texts, and what they cost."""

    ids: Int64[np.ndarray, " texts"]
    num_calls: int = 0
    num_truncated: int = 0


class Clusterer(Protocol):
    """Clusters the texts of several prompts at once; travels to the tasks that cluster blocks."""

    def cluster(self, prompts: Sequence[str], texts: Sequence[list[str]]) -> list[TextClusters]:
        """Return a result per prompt, given each prompt's different texts."""
        ...


def cluster_blocks(
    run: Run, services: Services, m1: Checkpoint, samples: BlockTable, table: BlockTable, clustering: str
) -> EntailmentCosts | None:
    """Fill a clusters table; return the costs if an entailment model was asked. Stop its fleet if it has done its work.

    Args:
        run: the run; `refresh.spg` names the models and the threshold.
        services: start the fleet that labels pairs or embeds texts.
        m1: embeds the texts if no other embedder is named.
        samples: the responses.
        table: the table to fill.
        clustering: name of a clustering.
    """
    clusterer, fleet = make_clusterer(run, services, m1, clustering)
    counts = map_blocks(
        table,
        partial(cluster_block, clusterer, samples),
        concurrency=fleet.concurrency,
        describe=count_clustered,
        progress="cluster",
    )
    if CLUSTERINGS[clustering].reads == "entailment":
        services.retire(fleet)  # no other stage reads entailment
        return entailment_costs(counts)
    # Under rlp no later stage asks an embedding fleet, unless it is the one that serves the reward model too.
    if run.config.pipeline == "rlp" and not run.config.clusters_by_rewarders:
        services.retire(fleet)
    return None


def make_clusterer(run: Run, services: Services, m1: Checkpoint, clustering: str) -> tuple[Clusterer, Fleet]:
    """Start the fleet that a clustering needs, and return its clusterer with that fleet."""
    spg = run.config.refresh.spg
    if CLUSTERINGS[clustering].reads == "entailment":
        fleet = services.ready(services.entailment(spg))
        return EntailmentClusterer(fleet=fleet, clustering=clustering), fleet
    embedding = embedding_of(run, services, m1, embedder=spg.embedder or "policy", normalize=True)
    clusterer = EmbeddingClusterer(embedding=embedding, clustering=clustering, threshold=spg.threshold)
    return clusterer, embedding.fleet


def cluster_block(clusterer: Clusterer, samples: BlockTable, block: int) -> pa.Table:
    """Make a block of a clusters table. Texts that differ in the space around them only are compared as one."""
    prompts = from_table(samples.read(block), Sampled)
    texts: list[list[str]] = []
    text_indices: list[Int64[np.ndarray, " responses"]] = []
    for sampled in prompts:
        own_texts, indices = distinct([response.text.strip() for response in sampled.responses])
        texts.append(own_texts)
        text_indices.append(indices)
    found = clusterer.cluster([sampled.prompt for sampled in prompts], texts)
    rows: list[Clustered] = []
    for sampled, own_texts, indices, clusters in zip(prompts, texts, text_indices, found, strict=True):
        num_samples = sum(response.num_samples for response in sampled.responses)
        rows.append(
            Clustered(
                prompt_id=sampled.prompt_id,
                clusters=clusters.ids[indices].tolist(),
                num_pairs=num_samples * (num_samples - 1),
                num_distinct_pairs=len(own_texts) * (len(own_texts) - 1),
                num_calls=clusters.num_calls,
                num_truncated=clusters.num_truncated,
            )
        )
    return to_table(rows, Clustered)


def count_clustered(block: pa.Table) -> dict[str, int]:
    """Add up the counts of a block of clusters."""
    return {name: sum(block[name].to_pylist()) for name in COUNTS}


def entailment_costs(blocks: Sequence[dict[str, int]]) -> EntailmentCosts:
    """Add up the blocks' counts into what clustering by entailment took."""
    total = {name: sum(counts[name] for counts in blocks) for name in COUNTS}
    return EntailmentCosts(
        num_nli_calls=total["num_calls"],
        num_truncated_pairs=total["num_truncated"],
        num_sample_pairs=total["num_pairs"],
        deduplicated_share=1 - total["num_distinct_pairs"] / max(1, total["num_pairs"]),
    )


@dataclass(frozen=True, kw_only=True)
class EntailmentClusterer:
    """Clusters by the labels of a served entailment model."""

    fleet: Fleet
    clustering: str

    def cluster(self, prompts: Sequence[str], texts: Sequence[list[str]]) -> list[TextClusters]:
        """Read `question answer` on both sides; see `label_clusters`."""
        read: list[list[str]] = []
        for prompt, own_texts in zip(prompts, texts, strict=True):
            read.append([f"{prompt} {text}" for text in own_texts])
        return label_clusters(self._classify, read, self.clustering)

    def _classify(self, pairs: list[Pair]) -> Entailments:
        answers: list[Entailments] = []
        # Without a pair there is one call all the same: its empty answer has the right types.
        for start in range(0, max(1, len(pairs)), PAIRS_PER_CALL):
            answers.append(self.fleet.call("classify", pairs[start : start + PAIRS_PER_CALL]))
        return Entailments(
            labels=np.concatenate([answer.labels for answer in answers]),
            asked=np.concatenate([answer.asked for answer in answers]),
            truncated=np.concatenate([answer.truncated for answer in answers]),
        )


@dataclass(frozen=True, kw_only=True)
class EmbeddingClusterer:
    """Clusters by the vectors of a served embedder."""

    embedding: Embedding
    clustering: str
    threshold: float

    def cluster(self, prompts: Sequence[str], texts: Sequence[list[str]]) -> list[TextClusters]:
        """Embed all texts of the block in one call."""
        del prompts
        tokenizer = self.embedding.tokenizer()
        tokens: list[list[int]] = []
        for own_texts in texts:
            for text in own_texts:
                # The policy reads a text as it reads a prompt; a sentence embedder adds its own special tokens.
                if self.embedding.uses_policy:
                    tokens.append(encode_prompt(tokenizer, text, "plain"))
                else:
                    tokens.append(encode_text(tokenizer, text))
        vectors = self.embedding.vectors(tokens)  # (texts of all prompts, width)
        ends = np.cumsum([len(own_texts) for own_texts in texts])
        find = CLUSTERINGS[self.clustering].find
        return [TextClusters(ids=find(part, self.threshold)) for part in np.split(vectors, ends[:-1])]


def label_clusters(
    classify: Callable[[list[Pair]], Entailments], texts: Sequence[list[str]], clustering: str
) -> list[TextClusters]:
    """Cluster several prompts' texts, given a function that labels pairs of texts.

    One direction of every pair is asked first, and the other only where it can still change the clusters: that spares
    about half of the model's work wherever answers contradict each other.
    """
    entry = CLUSTERINGS[clustering]
    # A question is (prompt, premise, hypothesis). All prompts' questions go together, so that few calls are small.
    forward: list[tuple[int, int, int]] = []
    for prompt, own_texts in enumerate(texts):
        for first, second in combinations(range(len(own_texts)), 2):
            forward.append((prompt, first, second))
    forward_answers = classify([(texts[p][first], texts[p][second]) for p, first, second in forward])

    backward: list[tuple[int, int, int]] = []
    for (prompt, first, second), is_open in zip(forward, entry.is_undecided(forward_answers.labels), strict=True):
        if is_open:
            backward.append((prompt, second, first))
    backward_answers = classify([(texts[p][first], texts[p][second]) for p, first, second in backward])

    # Where the other direction is not asked it cannot change a cluster, and takes the same label.
    matrices = [np.zeros((len(own_texts), len(own_texts)), np.int8) for own_texts in texts]
    for (prompt, first, second), label in zip(forward, forward_answers.labels, strict=True):
        matrices[prompt][first, second] = matrices[prompt][second, first] = label
    for (prompt, first, second), label in zip(backward, backward_answers.labels, strict=True):
        matrices[prompt][first, second] = label

    num_calls, num_truncated = np.zeros((2, len(texts)), np.int64)
    prompts = np.array([prompt for prompt, _, _ in [*forward, *backward]], np.int64)
    # Not `+=`, which counts a prompt that occurs several times in the index once.
    np.add.at(num_calls, prompts, np.append(forward_answers.asked, backward_answers.asked))
    np.add.at(num_truncated, prompts, np.append(forward_answers.truncated, backward_answers.truncated))
    clusters: list[TextClusters] = []
    for matrix, calls, truncated in zip(matrices, num_calls, num_truncated, strict=True):
        clusters.append(TextClusters(ids=entry.find(matrix), num_calls=int(calls), num_truncated=int(truncated)))
    return clusters
