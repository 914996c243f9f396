"""Win rates against a fixed table of answers: by the oracle's verdicts on pairs where it gives any, else by scores."""

import math
import uuid

import pytest

from rayrl.algorithms.estimate import Estimate
from rayrl.data.blocks import BlockTable
from rayrl.records import Comparison, content_id, from_table
from rayrl.stages.evaluation.held_out import HeldOut
from rayrl.stages.evaluation.references import against_references, as_question, read_references, win_rate
from tests.stages.labelling.test_preferences import run_in, save

PROMPTS = [f"One day, {name} saw a" for name in "ABCDEFGHIJKL"]
REFERENCE = "red fox 12"


def answer(prompt_id, text, score=None):
    return HeldOut(
        prompt_id=prompt_id, prompt=prompt_id, prompt_token_ids=[1], text=text, token_ids=[7], logprob=0.0, score=score
    )


def test_what_was_not_decided_is_left_out_and_ties_are_half():
    rate = win_rate([1.0, None, 0.5, 0.0, 1.0])
    assert rate is not None and (rate.mean, rate.num) == (0.625, 4)
    assert rate.standard_error == pytest.approx(math.sqrt((0.375**2 * 2 + 0.125**2 + 0.625**2) / 3 / 4))
    assert win_rate([1.0, None]) is None and win_rate([]) is None


def test_the_place_of_an_answer_is_a_function_of_the_seed_and_both_places_are_as_likely():
    places = [as_question(answer(f"p{i}", "ours"), "theirs", seed).first for seed in (0, 1) for i in range(200)]
    assert places == [as_question(answer(f"p{i}", "ours"), "theirs", seed).first for seed in (0, 1) for i in range(200)]
    assert 75 < places[:200].count("ours") < 125 and places[:200] != places[200:]


@pytest.fixture
def compete(ray_cluster, tiny_policy, tmp_path):
    """Policies' texts, by name, against the references under a scripted oracle; the result and the ledger's summary."""
    import ray

    from rayrl.models.judge_prompt import load_rubric
    from rayrl.oracles.pool import start_oracle_pool

    rows = [{"prompt": prompt, "response": REFERENCE} for prompt in PROMPTS]
    table = {"path": save(tmp_path / "answers.jsonl", [*rows, {"prompt": "Once", "response": " "}])}

    def compete(function, policies, *, order="random", budget=1000):
        compare = function and f"tests.oracles.length_oracle:{function}"
        scripted = {"type": "scripted", "function": "tests.oracles.length_oracle:judge", "compare_function": compare}
        evaluate = {"reference_answers": table | {"order": order}}
        run = run_in(tmp_path, tiny_policy, {"data": {"path": "unused"}}, oracle=scripted, evaluate=evaluate)
        ids = [*read_references(run), "a prompt without a reference"]
        answers = {name: [answer(*of) for of in zip(ids, *told, strict=False)] for name, told in policies.items()}
        oracle = start_oracle_pool(
            f"references-{uuid.uuid4().hex[:8]}",
            run.config.oracle,
            rubric=load_rubric(run.config.rubric),
            ledger=str(tmp_path / f"{uuid.uuid4().hex}.sqlite"),
            budgets={"label": 0, "evaluate": budget},
        )
        try:
            return against_references(run, oracle, answers), ray.get(oracle.summary.remote())["evaluate"]
        finally:
            ray.kill(oracle)

    return compete


UNSCORED = [None] * 13


def said(*texts):
    """A policy that says these, and the last of them to whatever is left."""
    return [*texts, *[texts[-1]] * (13 - len(texts))], UNSCORED


def comparisons(tmp_path, name):
    return from_table(BlockTable(str(tmp_path / "stages/evaluate" / f"comparisons-{name}"), 1).read(0), Comparison)


@pytest.mark.parametrize(("order", "num_asked"), [("random", 1), ("both", 2)])
def test_the_oracle_ranks_every_answer_and_the_reference(compete, tmp_path, order, num_asked):
    long, short, same_length = REFERENCE + "!", "", REFERENCE[::-1]
    policies = {"m1": said(short), "ppo": said(long, long, long, same_length, same_length, REFERENCE, short)}
    found, spent = compete("longer", policies, order=order)
    assert (found.by, found.num_prompts) == (order, 12)
    m1, ppo = found.policies["m1"], found.policies["ppo"]
    assert m1.win_rate == Estimate(0.0, 0.0, 12)
    assert (ppo.win_rate.mean, ppo.win_rate.num) == (pytest.approx(4.5 / 12), 12)
    assert (ppo.counts.num_ties, ppo.num_same, ppo.num_abstained, ppo.counts.num_disagreements) == (2, 1, 0, 0)
    assert spent.spent == (12 + 5) * num_asked == spent.scored  # what both policies say is paid for once
    asked = comparisons(tmp_path, "ppo")
    assert len(asked) == 11 * num_asked and {c.first == REFERENCE for c in asked} == {True, False}
    for c in asked:
        assert (c.first_id, c.second_id) == tuple(content_id(c.prompt_id, text) for text in (c.first, c.second))
        assert c.purpose == "evaluate"


def test_an_oracle_with_a_favourite_place_decides_nothing_when_asked_both_ways(compete):
    policies = {"m1": said("blue hen"), "ppo": said(*(f"hen {i}" for i in range(13)))}
    once, _ = compete("whatever_comes_first", policies)
    for policy in once.policies.values():
        assert policy.counts.first_position_share == 1.0 and 0 < policy.win_rate.mean < 1
    twice, spent = compete("whatever_comes_first", policies, order="both")
    for policy in twice.policies.values():
        assert policy.win_rate == Estimate(0.5, 0.0, 12)
        assert policy.counts.num_disagreements == 12
    assert spent.spent == 48


def test_what_the_budget_does_not_pay_for_is_not_counted(compete):
    policies = {"m1": said(REFERENCE + "!"), "ppo": said("")}
    found, spent = compete("longer", policies, budget=15)
    m1, ppo = found.policies["m1"], found.policies["ppo"]
    assert (m1.win_rate.num, m1.num_abstained) == (12, 0)
    assert (ppo.win_rate.num, ppo.num_abstained) == (3, 9)
    assert ppo.win_rate.mean == 0 and ppo.counts.abstentions == {"budget exhausted": 9} and spent.spent == 15


def test_an_oracle_that_compares_nothing_scores_the_references_once(compete, tmp_path):
    texts, _ = said("whatever")
    policies = {"m1": (texts, [3.0] * 6 + [2.0] * 7), "ppo": (texts, [1.0] * 3 + [None] * 10)}
    found, spent = compete(None, policies)
    m1, ppo = found.policies["m1"], found.policies["ppo"]
    assert (found.by, spent.spent) == ("scores", 1 * 12)
    assert (m1.win_rate.mean, m1.win_rate.num, m1.num_abstained) == (0.75, 12, 0)
    assert (ppo.win_rate.mean, ppo.win_rate.num, ppo.num_abstained) == (0.0, 3, 9)
    assert not (tmp_path / "stages/evaluate").exists()


@pytest.mark.parametrize("function", ["longer", None])
def test_nothing_judged_is_no_win_rate(compete, function):
    found, spent = compete(function, {"m1": ([], []), "ppo": ([], [])})
    assert found.num_prompts == spent.spent == 0
    assert all(policy.win_rate is None for policy in found.policies.values())
