"""Scoring responses with the trained evaluator, on the running fleets: to validate it, to pseudo-label, to evaluate.

Generative, score first: one prefill of the judge prompt; the score is the probability-weighted mean over the scores'
tokens. Generative, rationale first: the evaluator writes its review, and the score is read at its own position; several
reviews are averaged. Scalar: the head's value of the pooled prompt and response.
"""

from dataclasses import dataclass
from itertools import takewhile
from typing import Any

import numpy as np

from rayrl.algorithms.scoring import expected_score, mean_of_samples
from rayrl.config import EvaluatorConfig, PolicyConfig, RunConfig
from rayrl.data.tokenizing import context_length, encode_prompt, encode_response, load_tokenizer, render, resolve_format
from rayrl.engines.generator import Continuation, Sampling
from rayrl.fleets.fleet import Fleet
from rayrl.fleets.services import Services
from rayrl.models.judge_prompt import Rubric, evaluator_prompt, load_rubric, score_texts, upto_score
from rayrl.records import Checkpoint, Scored, content_id

MIN_MASS = 0.1
"""An evaluator that gives all scores together less probability than this has not understood: it abstains."""


@dataclass(frozen=True, kw_only=True)
class Scorer:
    """An evaluator and the fleet that serves it; travels to the tasks that score blocks."""

    checkpoint: Checkpoint
    fleet: Fleet
    evaluator: EvaluatorConfig
    policy: PolicyConfig
    rubric: Rubric
    max_tokens: int
    seed: int

    @property
    def concurrency(self) -> int:
        """Blocks to score at once."""
        return self.fleet.concurrency

    def score(self, items: list[Scored]) -> list[float | None]:
        """One score per item on the rubric's scale; None where the evaluator abstains."""
        if not items:
            return []
        if self.evaluator.type == "scalar":
            return self._scalar(items)
        if self.evaluator.scoring == "score_first":
            return self._score_first(items)
        return self._rationale_first(items)

    def _scalar(self, items: list[Scored]) -> list[float | None]:
        inputs = [item.token_ids[: self.max_tokens] for item in items]
        values = self.fleet.call("values", self.checkpoint, inputs)
        return [float(value) for value in values]

    def _score_first(self, items: list[Scored]) -> list[float | None]:
        tokenizer = load_tokenizer(self.policy)
        prefix, candidates = score_tokens(tokenizer, self.rubric)
        prompts = [tokens + prefix for tokens in self._judge_prompts(tokenizer, items)]
        logprobs = candidate_logprobs(self.fleet, self.checkpoint, prompts, list(candidates.values()))
        return [expected_score(np.array(row), np.array(list(candidates)), min_mass=MIN_MASS) for row in logprobs]

    def _rationale_first(self, items: list[Scored]) -> list[float | None]:
        tokenizer = load_tokenizer(self.policy)
        prompts = self._judge_prompts(tokenizer, items)
        sampling = Sampling(temperature=0.7, top_p=0.9, max_tokens=self.evaluator.max_rationale_tokens)
        seeds = [
            [
                int(content_id("review", str(self.seed), item.response, str(i)), 16) >> 1
                for i in range(self.evaluator.num_samples)
            ]
            for item in items
        ]
        reviews = self.fleet.call("write", self.checkpoint, prompts, seeds, sampling)
        written = [(prompt, review) for prompt, of_item in zip(prompts, reviews, strict=True) for review in of_item]
        scores = iter(self._read_scores(tokenizer, written))
        return [mean_of_samples([next(scores) for _ in of_item]) for of_item in reviews]

    def _read_scores(self, tokenizer: Any, written: list[tuple[list[int], Continuation]]) -> list[float | None]:
        """The expected score where each review (judge prompt, answer) has it; None where the writer never got there.

        Where the scores' first tokens differ, what was recorded during writing says it all; else one more prefill each.
        """
        prefix, candidates = score_tokens(tokenizer, self.rubric)
        places = [score_place(tokenizer, review, prefix) for _, review in written]
        arrived = [(*pair, place) for pair, place in zip(written, places, strict=True) if place is not None]
        firsts = [ids[0] for ids in candidates.values()]
        if len(set(firsts)) == len(firsts):
            rows = [[review.candidates[at].get(token, -np.inf) for token in firsts] for _, review, at in arrived]
        else:
            upto = [prompt + review.token_ids[:at] for prompt, review, at in arrived]
            rows = candidate_logprobs(self.fleet, self.checkpoint, upto, list(candidates.values())) if upto else []
        expected = iter([expected_score(np.array(row), np.array(list(candidates)), min_mass=MIN_MASS) for row in rows])
        return [None if place is None else next(expected) for place in places]

    def _judge_prompts(self, tokenizer: Any, items: list[Scored]) -> list[list[int]]:
        return [
            judge_prompt_tokens(tokenizer, self.policy, self.rubric, item.prompt, item.response, self.evaluator.scoring)
            for item in items
        ]


@dataclass(frozen=True, kw_only=True)
class Evaluator:
    """A trained evaluator that is not served yet: a reward too."""

    checkpoint: Checkpoint
    m1: Checkpoint
    """What the engines start from if they are not up."""
    config: RunConfig
    """Of the round it was fitted in."""

    @property
    def key(self) -> str:
        """Its weights."""
        return self.checkpoint.version

    @property
    def value_path(self) -> None:
        """A value function starts from M1."""
        return None

    def serve(self, services: Services) -> Scorer:
        """On the fleet of its kind."""
        config = self.config
        scalar = config.evaluator.type == "scalar"
        fleet = services.embedders(self.m1, config.select.pooling) if scalar else services.generators(self.m1)
        return Scorer(
            checkpoint=self.checkpoint,
            fleet=services.ready(fleet),
            evaluator=config.evaluator,
            policy=config.policy,
            rubric=load_rubric(config.rubric),
            max_tokens=context_length(config.policy),
            seed=config.seed,
        )


def judge_prompt_tokens(
    tokenizer: Any, policy: PolicyConfig, rubric: Rubric, prompt: str, response: str, scoring: Any
) -> list[int]:
    """What the generative evaluator reads; in a chat the cue opens the assistant's turn."""
    text = evaluator_prompt(rubric, prompt, response, scoring)
    if resolve_format(tokenizer, policy.prompt_format) == "plain":
        return encode_prompt(tokenizer, text, "plain")
    question, _, cue = text.rpartition("\n")
    rendered = render(tokenizer, "chat", question)
    return encode_prompt(tokenizer, rendered + cue, "chat")


def score_tokens(tokenizer: Any, rubric: Rubric) -> tuple[list[int], dict[int, list[int]]]:
    """Tokens all scores begin with (a lone space, say), and what follows them for each score."""
    tokens = {score: encode_response(tokenizer, text)[:-1] for score, text in score_texts(rubric).items()}
    columns = zip(*(ids[:-1] for ids in tokens.values()), strict=False)
    shared = sum(1 for _ in takewhile(lambda column: len(set(column)) == 1, columns))
    first = next(iter(tokens.values()))
    return first[:shared], {score: ids[shared:] for score, ids in tokens.items()}


def candidate_logprobs(
    fleet: Fleet, checkpoint: Checkpoint, prompts: list[list[int]], candidates: list[list[int]]
) -> list[list[float]]:
    """Read log p(candidate | prompt), (num_prompts, num_candidates).

    One prefill where every candidate is one token. Otherwise one per beginning that candidates share: the scores'
    tokens are a tree, and each inner node says how likely its branches are.
    """
    totals = np.zeros((len(prompts), len(candidates)))
    for beginning in sorted({tuple(c[:i]) for c in candidates for i in range(len(c))}):
        place = len(beginning)
        through = [n for n, c in enumerate(candidates) if tuple(c[:place]) == beginning and len(c) > place]
        branches = sorted({candidates[n][place] for n in through})
        branch = fleet.call("next_token_logprobs", checkpoint, [p + list(beginning) for p in prompts], branches)
        totals[:, through] += np.array(branch)[:, [branches.index(candidates[n][place]) for n in through]]
    return totals.tolist()


def score_place(tokenizer: Any, review: Continuation, prefix: list[int]) -> int | None:
    """Index of the token that tells the score in a written review; None if the writer never got there."""
    written = upto_score(tokenizer.decode(review.token_ids, skip_special_tokens=True))
    if written is None:
        return None
    place = next(
        i
        for i in range(len(review.token_ids) + 1)
        if tokenizer.decode(review.token_ids[:i], skip_special_tokens=True).startswith(written)
    )
    if review.token_ids[place : place + len(prefix)] == prefix:
        place += len(prefix)
    return place if place < len(review.token_ids) else None
