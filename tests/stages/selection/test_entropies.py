"""The strategy "entropy": the first round by another one, a later round by the evaluator of the round before."""

import numpy as np
import pytest

from rayrl.algorithms.acquisition import Answers
from rayrl.algorithms.scoring import predictive_entropy
from rayrl.config import PolicyConfig, RubricConfig, RunConfig
from rayrl.data.blocks import BlockTable
from rayrl.data.tokenizing import load_tokenizer
from rayrl.models.judge_prompt import load_rubric
from rayrl.records import Checkpoint, Response, Sampled, to_table
from rayrl.runs.run import Run
from rayrl.runs.stage_table import SELECT
from rayrl.stages.artifacts import Responses
from rayrl.stages.rewards.evaluator import judge_prompt_tokens, score_tokens
from rayrl.stages.rewards.evaluators import evaluator_of
from rayrl.stages.selection.select import select

NUM_BLOCKS, BLOCK_SIZE, K = 2, 5, 3


@pytest.fixture
def responses(tmp_path):
    """Three responses to each of ten prompts, but for one that has none left."""
    table = BlockTable(str(tmp_path / "responses"), NUM_BLOCKS)
    for block in range(NUM_BLOCKS):
        rows = []
        for number in range(block * BLOCK_SIZE, (block + 1) * BLOCK_SIZE):
            answers = [
                Response(
                    id=f"p{number}-{k}",
                    text=f"answer {k} to {number}",
                    token_ids=[k],
                    seed=k,
                    policy_version="m",
                    logprob=-1.0,
                    finish_reason="stop",
                )
                for k in range(0 if number == 3 else K)
            ]
            rows.append(
                Sampled(prompt_id=f"p{number}", prompt=f"question {number}", prompt_token_ids=[1], responses=answers)
            )
        table.write(block, to_table(rows, Sampled))
    return Responses(key="r", table=table, num_prompts=10, num_responses=27)


class Judge:
    """Engines whose probabilities of the two scores follow the sum of a prompt's tokens."""

    concurrency = 2

    def call(self, method, checkpoint, prompts, tokens):
        assert (method, checkpoint.version, len(tokens)) == ("next_token_logprobs", "evaluator-1", 2)
        return [probabilities(sum(prompt)) for prompt in prompts]


class NoEngine:
    """A fleet that must not be asked."""

    concurrency = 1

    def call(self, *arguments):
        raise AssertionError("nothing is read twice")


def probabilities(number):
    """Of the two scores; of every fifth number so small that they are no scores."""
    first = 0.4 + number % 50 / 100
    return np.log([0.01, 0.01] if number % 5 == 0 else [first, 1 - first]).tolist()


class Generators:
    """The one service that a generative evaluator needs."""

    def __init__(self, fleet):
        self.fleet = fleet

    def generators(self, m1):
        return self.fleet

    def ready(self, fleet):
        return fleet


@pytest.fixture
def rubric(tmp_path):
    """Of two scores, each of which is one token."""
    (tmp_path / "rubric.txt").write_text("Question: {prompt}\nAnswer: {response}\n")
    return {"template": str(tmp_path / "rubric.txt"), "min_score": 0, "max_score": 1}


@pytest.fixture
def selected(ray_cluster, tiny_policy, responses, rubric, tmp_path):
    def of(fleet, *, has_evaluator, ask=None, **settings):
        config = RunConfig.model_validate(
            {
                "name": "test",
                "run_dir": str(tmp_path),
                "rounds": 2,
                "policy": {"path": tiny_policy.path, "dtype": "float32"},
                "pool": {"path": "prompts.jsonl"},
                "sft": {"enabled": False},
                "rubric": rubric,
                "generate": {"k": K, "block_size": BLOCK_SIZE},
                "select": {"budget": 12, "strategy": "entropy", "first_batch": "random"} | settings,
                "oracle": {"type": "scripted", "function": "a:b"},
            }
        )
        run = Run(config=config, url=str(tmp_path))
        checkpoint = Checkpoint(path=tiny_policy.path, version="evaluator-1")
        evaluator = evaluator_of(run, checkpoint, tiny_policy.checkpoint) if has_evaluator else None
        rows = select(run, Generators(fleet), tiny_policy.checkpoint, responses, ask, evaluator).rows()
        manifest = run.manifest(SELECT)
        assert manifest is not None
        return [row["response_id"] for row in rows], manifest.metrics

    return of


@pytest.fixture
def by_entropy(tiny_policy, rubric):
    """Responses by falling entropy of what `Judge` says of their judge prompts, and those from which it abstains."""
    policy, scale = PolicyConfig(path=tiny_policy.path), load_rubric(RubricConfig(**rubric))
    tokenizer = load_tokenizer(policy)
    prefix, _ = score_tokens(tokenizer, scale)
    entropies = {}
    for number in (n for n in range(NUM_BLOCKS * BLOCK_SIZE) if n != 3):
        for k in range(K):
            texts = f"question {number}", f"answer {k} to {number}"
            tokens = judge_prompt_tokens(tokenizer, policy, scale, *texts, "score_first") + prefix
            entropies[f"p{number}-{k}"] = predictive_entropy([np.array(probabilities(sum(tokens)))], min_mass=0.1)
    known = [name for name in entropies if entropies[name] is not None]
    # Equal ones stay in the order of the ordinals.
    return sorted(known, key=lambda name: -round(entropies[name], 9)), set(entropies) - set(known)


def test_the_least_sure_are_asked_about_and_read_once(selected, by_entropy):
    order, abstained = by_entropy
    picks, metrics = selected(Judge(), has_evaluator=True)
    assert picks == order[:12] and abstained
    assert (metrics.strategy, metrics.num_unread, metrics.num_embedded) == ("entropy", len(abstained), None)
    # Another budget reads the entropies that are there; what the evaluator cannot tell comes last.
    more, _ = selected(NoEngine(), has_evaluator=True, budget=27)
    assert more[: len(order)] == order and set(more[len(order) :]) == abstained


def test_the_first_round_is_of_the_strategy_that_needs_no_evaluator(selected):
    picks, metrics = selected(NoEngine(), has_evaluator=False)
    assert len(set(picks)) == 12 and (metrics.strategy, metrics.num_unread) == ("random", None)


def test_in_batches_what_is_refused_for_nothing_gives_way_to_the_next_least_sure(selected, by_entropy):
    order, _ = by_entropy

    def ask(rows):
        scores = [None if row["response_id"] == order[0] else 1.0 for row in rows]
        unpaid = [number for number, score in enumerate(scores) if score is None]
        return Answers(scores=scores, num_spent=len(scores) - len(unpaid), unpaid=unpaid)

    picks, metrics = selected(Judge(), has_evaluator=True, ask=ask, batches=2)
    assert picks == order[1:13] and [batch.num_asked for batch in metrics.batches] == [6, 7]
