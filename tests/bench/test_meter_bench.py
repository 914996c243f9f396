"""The bench of the label meter: what it keeps between starts."""

import importlib

import numpy as np


def test_finished_trials_are_those_of_the_same_vectors_and_grades(monkeypatch):
    monkeypatch.syspath_prepend("jobs/bench")
    meter = importlib.import_module("meter")
    vectors, scores, prompts = np.eye(4, dtype=np.float32), np.arange(4.0), np.array([0, 0, 1, 1])

    def name(vectors=vectors, scores=scores, of="MiniLM", budget=100):
        labels = meter.Labels(vectors=vectors, labels=scores, groups=prompts, compares=False)
        return meter.trials_file(labels, "whole prompts, with length", of, budget, 20)

    assert name().startswith("whole-prompts-with-length-MiniLM-") and name() == name(vectors.copy())
    others = [name(vectors + 1), name(scores=scores + 1), name(of="hashed words"), name(budget=200)]
    assert len({name(), *others}) == 5
