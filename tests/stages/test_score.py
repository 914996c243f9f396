"""Reading scores: their tokens, their log-probabilities, and their place in a written review."""

from pathlib import Path

import numpy as np
import pytest
import torch

from rayrl.actors.generator import Continuation
from rayrl.config import PolicyConfig
from rayrl.data.collate import collate
from rayrl.data.tokenizing import encode_response, load_tokenizer
from rayrl.models.judge import ADDITIVE_RUBRIC, Rubric
from rayrl.models.policy import response_logprobs
from rayrl.stages.score import candidate_logprobs, read_score, score_tokens

RUBRIC = Rubric(template=ADDITIVE_RUBRIC, min_score=0, max_score=5)
SHORT = Rubric(template=ADDITIVE_RUBRIC, min_score=0, max_score=2)
"""Each of these scores is one token of the quickstart's tokenizer."""
STORIES = Path(__file__).parents[3] / "shared" / "data" / "models" / "stories260K"
PROMPTS = [[1, 20, 30, 40], [1, 50], list(range(1, 40))]


def test_score_tokens_spell_the_scores(tiny_policy):
    tokenizer = load_tokenizer(PolicyConfig(path=tiny_policy.path))
    prefix, candidates = score_tokens(tokenizer, RUBRIC)
    assert list(candidates) == [0, 1, 2, 3, 4, 5]
    assert [tokenizer.decode(prefix + ids) for ids in candidates.values()] == [f" {score}" for score in range(6)]
    assert len({tuple(ids) for ids in candidates.values()}) == 6


@pytest.mark.skipif(not STORIES.is_dir(), reason="../shared/data/models/stories260K is not there")
def test_score_tokens_of_a_tokenizer_that_spells_digits_in_several_tokens():
    tokenizer = load_tokenizer(PolicyConfig(path=str(STORIES)))
    prefix, candidates = score_tokens(tokenizer, RUBRIC)
    for score, ids in candidates.items():
        assert ids
        assert prefix + ids == encode_response(tokenizer, f" {score}")[:-1]
    assert len({tuple(ids) for ids in candidates.values()}) == 6


@pytest.mark.parametrize("candidates", [[[7], [8], [9]], [[7, 8], [7, 9], [7, 8, 10]]], ids=["single", "several"])
def test_candidate_logprobs_are_transformers(generators, tiny_policy, candidates):
    ours = candidate_logprobs(generators, tiny_policy.checkpoint, PROMPTS, candidates)
    model = tiny_policy.load()
    with torch.no_grad():
        expected = [response_logprobs(model, collate([p] * 3, candidates)).tolist() for p in PROMPTS]
    np.testing.assert_allclose(ours, expected, atol=1e-3)


def written(tokenizer, text, scores):
    """A review whose candidates say `scores` at the last digit and something else everywhere before."""
    token_ids = encode_response(tokenizer, text)
    prefix, candidates = score_tokens(tokenizer, SHORT)
    decoy = {candidates[0][0]: 0.0}
    place = max(i for i, token in enumerate(token_ids) if token in {ids[0] for ids in candidates.values()})
    positions = [decoy] * place + [{candidates[s][0]: float(np.log(p)) for s, p in scores.items()}]
    review = Continuation(
        text=text,
        token_ids=token_ids,
        logprob=0.0,
        finish_reason="stop",
        candidates=positions + [decoy] * (len(token_ids) - place - 1),
    )
    return read_score(review, tokenizer, prefix, candidates)


@pytest.fixture
def tokenizer(tiny_policy):
    return load_tokenizer(PolicyConfig(path=tiny_policy.path))


def test_the_score_is_read_after_the_rationale(tokenizer):
    text = " It has 2 steps.\nIt is polite.\nScore: 2"
    assert written(tokenizer, text, {1: 0.25, 2: 0.25}) == pytest.approx(1.5)
    assert written(tokenizer, text, {2: 0.9}) == pytest.approx(2.0)


def test_the_last_score_line_counts(tokenizer):
    assert written(tokenizer, " Hm.\nScore: 1\nNo.\nScore: 2", {2: 0.6, 1: 0.2}) == pytest.approx(1.75)


def test_a_review_that_never_gets_there_abstains(tokenizer):
    assert written(tokenizer, " It has 2 steps, and is polite.", {2: 1.0}) is None
    assert written(tokenizer, " Hm.\nScore: 1", {2: 0.05}) is None
