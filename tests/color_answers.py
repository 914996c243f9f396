"""Answers of a policy to six prompts, their rewards and clusters, and a fleet that tells clusters by last words."""

import json
from dataclasses import dataclass

import numpy as np

from rayrl.engines.entailment import Entailments
from rayrl.records import Response, Sampled

ANSWERS = {
    "p0": [("red", 3), ("it is red", 2), ("blue", 2), ("green", 1), ("it is blue", 2)],  # red 5 of 10
    "p1": [("red", 1), ("blue", 2), ("green", 3)],  # with 4 empty ones: empty 4, green 3 of 10
    "p2": [("white", 9), ("it is white", 1)],
    "p3": [("red", 2), (" blue", 2), ("blue", 2), ("green", 2), ("white", 2)],  # blue 4 of 10
    "p4": [("black", 7), ("red", 3)],  # black has no reward
    "p5": [],
}
NUM_EMPTY = {"p1": 4, "p5": 10}
CLUSTERS = {"p0": [0, 0, 1, 2, 1], "p1": [0, 1, 2], "p2": [0, 0], "p3": [0, 1, 1, 2, 3], "p4": [0, 1], "p5": []}
"""By meaning."""
REWARDS = {"red": 1.0, "it is red": 2.0, "blue": 3.0, "it is blue": 0.5, "green": 0.0, "white": 4.0}


def sampled(prompt):
    responses = [
        Response(
            id=f"{prompt}-{i}",
            text=text,
            token_ids=[10 + i] * (i + 1),
            seed=i,
            policy_version="pi" if i else "tiny",
            logprob=-float(i + 1),
            finish_reason="stop",
            num_samples=num_samples,
        )
        for i, (text, num_samples) in enumerate(ANSWERS[prompt])
    ]
    return Sampled(
        prompt_id=prompt,
        prompt="what color is it ?",
        prompt_token_ids=[1, 5],
        responses=responses,
        num_empty=NUM_EMPTY.get(prompt, 0),
    )


SAMPLED = {prompt: sampled(prompt) for prompt in ANSWERS}


@dataclass(frozen=True)
class TableRewards:
    """A reward of each text from a table; writes what it is asked to a file, in whichever process."""

    log: str

    def serve(self, services):
        return self

    def score(self, items, reasons=None):
        with open(self.log, "a") as file:
            file.writelines(f"{item.response}\n" for item in items)
        return [REWARDS.get(item.response.strip()) for item in items]


@dataclass(frozen=True)
class ColorFleet:
    """As much of a fleet as entailment needs: equal last words entail each other, other ones contradict."""

    log: str
    concurrency = 2

    def call(self, method, pairs):
        assert method == "classify"
        with open(self.log, "a") as file:
            file.writelines(json.dumps(pair) + "\n" for pair in pairs)
        labels = [2 * (a.split()[-1] == b.split()[-1]) for a, b in pairs]
        nothing = np.zeros(len(pairs), bool)
        return Entailments(labels=np.array(labels, np.int8), asked=~nothing, truncated=nothing)
