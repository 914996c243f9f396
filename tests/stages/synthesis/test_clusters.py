"""Clusters of answers that mean the same: the questions to the entailment model, and those that are spared."""

import json
from pathlib import Path

import numpy as np
import pytest

from rayrl.algorithms.clustering import entailment_clusters
from rayrl.engines.entailment import EntailmentModel, Entailments, EntailmentSpec
from rayrl.stages.synthesis.clusters import EntailmentClusterer, label_clusters
from tests.color_answers import ColorFleet
from tests.entailment_model import make_sick_model

SICK = Path(__file__).parents[4] / "shared" / "data" / "sick_train.jsonl.gz"


@pytest.mark.parametrize("definition", ["strict", "kuhn2023", "farquhar2024"])
def test_an_unasked_direction_changes_no_cluster(definition):
    rng = np.random.default_rng(0)
    asked = []
    for size in [0, 1, *rng.integers(2, 8, 60)]:
        labels = rng.choice(3, (2, size, size), p=[0.2, 0.3, 0.5])
        texts = [[f"{prompt} {i}" for i in range(size)] for prompt in range(2)]

        def ask(pairs, labels=labels):
            asked.extend(pairs)
            of = [[tuple(map(int, text.split())) for text in pair] for pair in pairs]
            found = np.array([labels[p, i, j] for (p, i), (_, j) in of], np.int8)
            return Entailments(labels=found, asked=found >= 0, truncated=found < 0)

        asked.clear()
        found = label_clusters(ask, texts, definition)
        assert [f.ids.tolist() for f in found] == [entailment_clusters(m, definition).tolist() for m in labels]
        assert len(set(asked)) == len(asked) == sum(f.num_calls for f in found) <= 2 * size * (size - 1)


def test_the_model_reads_question_and_answer(tmp_path):
    clusterer = EntailmentClusterer(fleet=ColorFleet(str(tmp_path / "log")), clustering="strict")
    (found,) = clusterer.cluster(["what color ?"], [["red", "it is red", "blue"]])
    assert found.ids.tolist() == [0, 0, 1]
    asked = [tuple(json.loads(line)) for line in (tmp_path / "log").read_text().splitlines()]
    texts = ["what color ? red", "what color ? it is red", "what color ? blue"]
    assert asked == [(texts[0], texts[1]), (texts[0], texts[2]), (texts[1], texts[2]), (texts[1], texts[0])]
    assert found.num_calls == 4


@pytest.mark.slow
@pytest.mark.skipif(not SICK.exists(), reason="../shared/data/sick_train.jsonl.gz is not there")
def test_a_model_trained_on_human_labels_tells_paraphrases_apart(tmp_path):
    accuracy = make_sick_model(tmp_path / "nli", SICK)
    assert accuracy > 0.7
    model = EntailmentModel(EntailmentSpec(path=str(tmp_path / "nli"), max_tokens=128, threads=2, on_gpu=False))
    texts = ["A man is playing a guitar", "A guitar is being played by a man", "There is no man playing a guitar"]
    (found,) = label_clusters(model.classify, [texts], "strict")
    assert found.ids.tolist() == [0, 0, 1]
