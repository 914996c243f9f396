"""Reading scores: their tokens, their log-probabilities, and their place in a written review."""

from pathlib import Path

import numpy as np
import pytest
import torch

from rayrl.config import EvaluatorConfig, PolicyConfig
from rayrl.data.collate import collate
from rayrl.data.tokenizing import encode_response, load_tokenizer
from rayrl.engines.generator import Continuation
from rayrl.models.judge_prompt import ADDITIVE_RUBRIC, Rubric
from rayrl.models.policy import response_logprobs
from rayrl.records import Scored
from rayrl.stages.rewards.evaluator import (
    MIN_MASS,
    GenerativeScorer,
    ScalarScorer,
    candidate_logprobs,
    judge_prompt_tokens,
    score_tokens,
)

RUBRIC = Rubric(template=ADDITIVE_RUBRIC, min_score=0, max_score=5)
SHORT = Rubric(template=ADDITIVE_RUBRIC, min_score=0, max_score=2)
"""Each of these scores is one token of the quickstart's tokenizer."""
STORIES = Path(__file__).parents[4] / "shared" / "data" / "models" / "stories260K"
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


@pytest.mark.parametrize("candidates", [[[7], [8], [9]], [[6], [7, 9], [7, 8, 10]]], ids=["single", "several"])
def test_candidate_logprobs_are_transformers(generators, tiny_policy, candidates):
    ours = candidate_logprobs(generators, tiny_policy.checkpoint, PROMPTS, candidates)
    model = tiny_policy.load()
    with torch.no_grad():
        expected = [response_logprobs(model, collate([p] * 3, candidates)).tolist() for p in PROMPTS]
    np.testing.assert_allclose(ours, expected, atol=1e-3)


class Writer:
    """As much of a fleet as rationales need: writes given reviews, finds one score's tokens likely in any prefill."""

    def __init__(self, reviews, likeliest=None):
        self.reviews, self.likeliest, self.prefills = reviews, likeliest, []

    def call(self, method, checkpoint, *arguments):
        if method == "write":
            return self.reviews
        assert method == "next_token_logprobs"
        prompts, tokens = arguments
        self.prefills.append(prompts)
        return [[float(np.log(0.6 if token in self.likeliest else 0.06)) for token in tokens] for _ in prompts]


def scorer(fleet, policy, rubric, *, scoring="rationale_first", max_tokens=512):
    return GenerativeScorer(
        checkpoint=policy.checkpoint,
        fleet=fleet,
        settings=EvaluatorConfig(scoring=scoring, num_samples=2),
        max_tokens=max_tokens,
        policy=PolicyConfig(path=policy.path),
        rubric=rubric,
        seed=0,
    )


def review(token_ids, candidates):
    return Continuation(
        text="",
        token_ids=token_ids,
        logprob=0.0,
        token_logprobs=[],
        finish_reason="stop",
        versions=["tiny"],
        candidates=candidates,
    )


ITEM = Scored(prompt="How do I boil rice?", response="First add water.", token_ids=[])
LONG = Scored(prompt="How do I boil rice?", response="First add water. " * 400, token_ids=[])


@pytest.fixture
def read(tiny_policy):
    """Scores a review whose candidates say `scores` at the last digit and something else everywhere before."""
    tokenizer = load_tokenizer(PolicyConfig(path=tiny_policy.path))

    def of(text, scores):
        token_ids = encode_response(tokenizer, text)
        _, candidates = score_tokens(tokenizer, SHORT)
        decoy = {candidates[0][0]: 0.0}
        place = max(i for i, token in enumerate(token_ids) if token in {ids[0] for ids in candidates.values()})
        positions = [decoy] * len(token_ids)
        positions[place] = {candidates[score][0]: float(np.log(p)) for score, p in scores.items()}
        (score,) = scorer(Writer([[review(token_ids, positions)]]), tiny_policy, SHORT).score([ITEM])
        return score

    return of


def test_the_score_is_read_after_the_rationale(read):
    text = " It has 2 steps.\nIt is polite.\nScore: 2"
    assert read(text, {1: 0.25, 2: 0.25}) == pytest.approx(1.5)
    assert read(text, {2: 0.9}) == pytest.approx(2.0)


def test_the_last_score_line_counts(read):
    assert read(" Hm.\nScore: 1\nNo.\nScore: 2", {2: 0.6, 1: 0.2}) == pytest.approx(1.75)


def test_a_review_that_never_gets_there_abstains(read):
    assert read(" It has 2 steps, and is polite.", {2: 1.0}) is None
    assert read(" Hm.\nScore: 1", {2: 0.05}) is None


def test_scores_that_begin_alike_are_read_by_a_prefill_of_what_was_written(tiny_policy):
    tokenizer = load_tokenizer(PolicyConfig(path=tiny_policy.path))
    prefix, candidates = score_tokens(tokenizer, RUBRIC)
    assert len({ids[0] for ids in candidates.values()}) < len(candidates)
    texts = [[" Hm.\nScore: 4", " It has 2 steps."], [" No idea.", ""], [" Fine.\nScore: 1", " Well.\nScore: 5"]]
    reviews = [[review(encode_response(tokenizer, text), []) for text in of_item] for of_item in texts]
    writer = Writer(reviews, likeliest=candidates[4])
    likely = {n: np.prod([0.6 if t in candidates[4] else 0.06 for t in ids]) for n, ids in candidates.items()}
    expected = pytest.approx(sum(n * p for n, p in likely.items()) / sum(likely.values()))
    assert scorer(writer, tiny_policy, RUBRIC).score([ITEM] * 3) == [expected, None, expected]
    judge = judge_prompt_tokens(
        tokenizer, PolicyConfig(path=tiny_policy.path), RUBRIC, ITEM.prompt, ITEM.response, "rationale_first"
    )
    cut = [encode_response(tokenizer, f"{text}\nScore:")[:-1] for text in (" Hm.", " Fine.", " Well.")]
    starts = [judge + tokens + prefix for tokens in cut]
    shared = candidates[4][:1]
    assert writer.prefills == [starts, [start + shared for start in starts]]


def test_entropies_are_of_the_mean_of_the_reviews_distributions(tiny_policy):
    """Hand-computed: (3/4, 1/4, 0) and (0, 1/4, 3/4) have the mean (3/8, 1/4, 3/8); one review gets to no score."""
    tokenizer = load_tokenizer(PolicyConfig(path=tiny_policy.path))
    _, candidates = score_tokens(tokenizer, SHORT)

    def reviewed(text, probabilities):
        token_ids = encode_response(tokenizer, text)
        at = {candidates[score][0]: float(np.log(p)) for score, p in probabilities.items()}
        return review(token_ids, [at] * len(token_ids))

    two = [reviewed("\nScore: 1", {0: 0.6, 1: 0.2}), reviewed("\nScore: 1", {1: 0.1, 2: 0.3})]
    one = [reviewed(" No idea.", {}), reviewed("\nScore: 2", {1: 0.4, 2: 0.4})]
    none = [reviewed(" No idea.", {}), reviewed("\nScore: 1", {1: 0.01})]
    first, second, third = scorer(Writer([two, one, none]), tiny_policy, SHORT).entropies([ITEM] * 3)
    p = np.array([3 / 8, 1 / 4, 3 / 8])
    assert (first, second, third) == (pytest.approx(-(p * np.log(p)).sum()), pytest.approx(np.log(2)), None)


def test_the_entropy_of_a_score_is_that_of_the_engines_probabilities(generators, tiny_policy):
    tokenizer, settings = load_tokenizer(PolicyConfig(path=tiny_policy.path)), PolicyConfig(path=tiny_policy.path)
    prefix, candidates = score_tokens(tokenizer, SHORT)
    judge = judge_prompt_tokens(tokenizer, settings, SHORT, ITEM.prompt, ITEM.response, "score_first")
    model = tiny_policy.load()
    with torch.no_grad():
        logprobs = response_logprobs(model, collate([judge + prefix] * 3, list(candidates.values()))).numpy()
    p = np.exp(logprobs)
    found = scorer(generators, tiny_policy, SHORT, scoring="score_first").entropies([ITEM, LONG])
    p = p / p.sum()
    is_understood = np.exp(logprobs).sum() >= MIN_MASS
    assert found == [pytest.approx(-(p * np.log(p)).sum(), abs=1e-3) if is_understood else None, None]


@pytest.mark.parametrize("scoring", ["score_first", "rationale_first"])
def test_judge_prompts_beyond_the_context_abstain_and_the_others_are_scored(generators, tiny_policy, scoring):
    """The engine refuses them, and ended the run."""
    reasons = {}
    scores = scorer(generators, tiny_policy, SHORT, scoring=scoring).score([LONG, ITEM, LONG], reasons)
    assert (scores[0], scores[2], reasons) == (None, None, {0: "too_long", 2: "too_long"})
    assert scores[1:2] == scorer(generators, tiny_policy, SHORT, scoring=scoring).score([ITEM])


@pytest.mark.parametrize(("num_spare", "is_scored"), [(0, True), (-1, False)])
def test_a_judge_prompt_needs_room_for_a_score_and_no_more(tiny_policy, num_spare, is_scored):
    tokenizer = load_tokenizer(PolicyConfig(path=tiny_policy.path))
    prefix, candidates = score_tokens(tokenizer, RUBRIC)
    prompt = judge_prompt_tokens(
        tokenizer, PolicyConfig(path=tiny_policy.path), RUBRIC, ITEM.prompt, ITEM.response, "score_first"
    )
    needed = len(prompt) + len(prefix) + max(map(len, candidates.values()))
    writer = Writer([], likeliest=candidates[4])
    reasons = {}
    limit = needed + num_spare
    (score,) = scorer(writer, tiny_policy, RUBRIC, scoring="score_first", max_tokens=limit).score([ITEM], reasons)
    assert (score is not None, reasons) == (is_scored, {} if is_scored else {0: "too_long"})
    # A prefill is followed by a token.
    assert all(len(tokens) < limit for prefill in writer.prefills for tokens in prefill)


def test_a_review_that_the_context_ends_inside_its_score_abstains(tiny_policy):
    tokenizer = load_tokenizer(PolicyConfig(path=tiny_policy.path))
    _, candidates = score_tokens(tokenizer, RUBRIC)
    written = encode_response(tokenizer, " Hm.\nScore: 4")[:-1]
    judge = judge_prompt_tokens(
        tokenizer, PolicyConfig(path=tiny_policy.path), RUBRIC, ITEM.prompt, ITEM.response, "rationale_first"
    )
    for limit, is_scored in ((len(judge) + len(written), True), (len(judge) + len(written) - 1, False)):
        writer = Writer([[review(written, [])]], likeliest=candidates[4])
        (score,) = scorer(writer, tiny_policy, RUBRIC, max_tokens=limit).score([ITEM])
        assert (score is not None, bool(writer.prefills)) == (is_scored, is_scored)


def test_a_scalar_evaluator_abstains_on_sequences_beyond_its_context(tiny_policy):
    class Values:
        def call(self, method, checkpoint, inputs):
            return [float(len(tokens)) for tokens in inputs]

    scalar = ScalarScorer(checkpoint=tiny_policy.checkpoint, fleet=Values(), max_tokens=3)  # type: ignore[arg-type]
    items = [Scored(prompt="?", response="!", token_ids=[1] * num) for num in (2, 4, 3)]
    reasons = {}
    assert scalar.score(items, reasons) == [2.0, None, 3.0] and reasons == {1: "too_long"}
    assert scalar.score(items[1:2]) == [None] and scalar.score([]) == []
