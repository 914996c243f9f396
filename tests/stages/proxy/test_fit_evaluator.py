"""Training and validation data of the evaluator."""

import dataclasses
from collections import Counter

import pyarrow as pa
import pytest

from rayrl.config import RunConfig
from rayrl.data.blocks import BlockTable
from rayrl.errors import DataError
from rayrl.models.judge_prompt import ADDITIVE_RUBRIC, Rubric
from rayrl.records import Checkpoint, Judgement, to_table
from rayrl.runs.run import Run
from rayrl.stages.artifacts import Judgements, QuerySet
from rayrl.stages.proxy.fit_evaluator import split, training_judgements
from rayrl.stages.rewards.evaluator import balance
from rayrl.stages.rewards.evaluators import evaluator_of

RUBRIC = Rubric(template=ADDITIVE_RUBRIC, min_score=0, max_score=5)


def judgement(prompt, index, score):
    return Judgement(
        key=f"{prompt}{index}",
        prompt_id=prompt,
        response_id=f"{prompt}-{index}",
        prompt="?",
        response=f"answer {index}",
        oracle="o",
        status="abstained" if score is None else "scored",
        score=score,
        rationale=f"because {score}",
        purpose="label",
        cost_usd=0.0,
    )


JUDGEMENTS = [judgement(f"p{n}", i, float((n + i) % 6)) for n in range(20) for i in range(n % 3 + 1)]


def test_a_prompt_is_on_one_side_of_the_split():
    training, held_out = split(JUDGEMENTS, 0.25, seed=0)
    prompts = {j.prompt_id for j in training}, {j.prompt_id for j in held_out}
    assert not prompts[0] & prompts[1]
    assert len(prompts[1]) == 5
    assert sorted(j.key for j in training + held_out) == sorted(j.key for j in JUDGEMENTS)


def test_the_split_follows_the_seed_and_not_the_order():
    held_out = {j.key for j in split(JUDGEMENTS, 0.25, seed=0)[1]}
    assert held_out == {j.key for j in split(JUDGEMENTS[::-1], 0.25, seed=0)[1]}
    assert held_out != {j.key for j in split(JUDGEMENTS, 0.25, seed=1)[1]}


@pytest.mark.parametrize("holdout", [0.001, 0.999])
def test_no_side_of_the_split_is_empty(holdout):
    assert all(split([judgement("a", 0, 1.0), judgement("b", 0, 2.0)], holdout, seed=0))


def test_balance_repeats_the_rare_and_drops_nobody():
    judgements = [judgement(f"p{n}", 0, score) for n, score in enumerate([0.0] * 7 + [2.6, 3.4, 3.0] + [5.0])]
    balanced = balance(judgements, RUBRIC)
    counts = Counter(j.key for j in balanced)
    assert set(counts) == {j.key for j in judgements}
    assert Counter(round(j.score) for j in balanced) == {0: 7, 3: 7, 5: 7}
    assert sorted(counts[f"p{n}0"] for n in (7, 8, 9)) == [2, 2, 3]


def open_run(tmp_path, control, **tables):
    config = RunConfig.model_validate(
        {
            "name": "test",
            "run_dir": str(tmp_path),
            "labels": control,
            "policy": {"path": "model"},
            "pool": {"path": "prompts.jsonl"},
            "sft": {"enabled": False},
            "select": {"budget": 8, "unit": "prompt"},
            "oracle": {"type": "scripted", "function": "a:b"},
        }
        | tables
    )
    return Run(config=config, url=str(tmp_path))


def paid(folder, judgements):
    """The judgements of one round; the tokens of an answer are its number."""
    table, asked = (BlockTable(str(folder / name), 1) for name in ("judgements", "asked"))
    table.write(0, to_table(judgements, Judgement))
    rows = [{"prompt_id": j.prompt_id, "response": j.response, "token_ids": [1, n]} for n, j in enumerate(judgements)]
    asked.write(0, pa.Table.from_pylist(rows))
    return Judgements(key=folder.name, table=table, query_set=QuerySet(key="q", table=asked))


def run_with(tmp_path, control, judgements):
    return training_judgements(open_run(tmp_path, control), [paid(tmp_path, judgements)])


def scalar_rows(folder, judgements, tokens, **settings):
    """The rows that a scalar evaluator is trained on."""
    policy = {"path": "model", "max_model_len": 100}
    run = open_run(folder, "proxy", policy=policy, evaluator={"type": "scalar"} | settings)
    m1 = Checkpoint(path="m1", version="m1")
    return evaluator_of(run, m1, m1).training(run, "float32", judgements, tokens).rows


def generative_training(folder, policy, judgements, max_model_len, **settings):
    """The training of a generative evaluator with a context of this length."""
    run = open_run(
        folder,
        "proxy",
        policy={"path": policy.path, "max_model_len": max_model_len},
        evaluator=settings,
    )
    m1 = Checkpoint(path="m1", version="m1")
    return evaluator_of(run, m1, m1).training(run, "float32", judgements, {})


@pytest.mark.parametrize("scoring", ["score_first", "rationale_first"])
def test_judgements_beyond_the_context_are_left_out_and_counted(tmp_path, tiny_policy, scoring):
    """Where the score comes last, a target that is cut would teach reviews without a score."""
    short, long = judgement("p", 0, 4.0), dataclasses.replace(judgement("q", 0, 4.0), response="water " * 200)
    wordy = dataclasses.replace(judgement("r", 0, 4.0), rationale="because it boils " * 200)
    whole = generative_training(tmp_path, tiny_policy, [short], None, scoring=scoring).rows[0]
    limit = len(whole["prompt_token_ids"]) + len(whole["response_token_ids"])
    training = generative_training(tmp_path, tiny_policy, [short, long, wordy], limit, scoring=scoring, balanced=True)
    kept = ["p-0", "r-0"] if scoring == "score_first" else ["p-0"]
    assert [row["response_id"] for row in training.rows] == kept
    assert training.num_too_long == 3 - len(kept)
    assert all(len(row["prompt_token_ids"]) + len(row["response_token_ids"]) == limit for row in training.rows)
    assert training.rows[0] == whole
    with pytest.raises(DataError, match="no judge prompt fits the context"):
        generative_training(tmp_path, tiny_policy, [long], limit, scoring=scoring)


@pytest.mark.parametrize("loss", ["regression", "bradley_terry"])
def test_a_scalar_evaluator_learns_from_no_sequence_beyond_the_context(tmp_path, loss):
    judged = [judgement("p", i, float(i)) for i in range(3)]
    tokens = {j.response_key: [1] * (i + 2) for i, j in enumerate(judged)}
    run = open_run(
        tmp_path, "proxy", policy={"path": "model", "max_model_len": 3}, evaluator={"type": "scalar", "loss": loss}
    )
    m1 = Checkpoint(path="m1", version="m1")
    training = evaluator_of(run, m1, m1).training(run, "float32", judged, tokens)
    assert training.num_too_long == 1 and "p-2" not in str(training.rows) and "p-1" in str(training.rows)
    for j in judged:
        tokens[j.response_key] = [1] * 4
    with pytest.raises(DataError, match="fit the context of 3 tokens"):
        evaluator_of(run, m1, m1).training(run, "float32", judged, tokens)


def test_abstentions_are_no_labels(tmp_path):
    assert run_with(tmp_path, "proxy", [*JUDGEMENTS, judgement("z", 0, None)]) == JUDGEMENTS


def test_the_shuffled_control_permutes_scores_with_their_reasons(tmp_path):
    shuffled = run_with(tmp_path, "shuffled", JUDGEMENTS)
    assert [j.response_id for j in shuffled] == [j.response_id for j in JUDGEMENTS]
    assert sorted(j.score for j in shuffled) == sorted(j.score for j in JUDGEMENTS)
    assert [j.score for j in shuffled] != [j.score for j in JUDGEMENTS]
    assert all(j.rationale == f"because {j.score}" for j in shuffled)
    assert shuffled == run_with(tmp_path, "shuffled", JUDGEMENTS)


def test_bradley_terry_pairs_every_two_unequal_scores_of_a_prompt(tmp_path):
    judged = [judgement("p", 0, 2.0), judgement("p", 1, 5.0), judgement("p", 2, 2.0), judgement("q", 0, 1.0)]
    tokens = paid(tmp_path, judged).token_ids()
    assert scalar_rows(tmp_path, judged, tokens, loss="bradley_terry") == [
        {"chosen_id": "p-1", "rejected_id": rejected, "chosen_token_ids": [1, 1], "rejected_token_ids": [1, n]}
        for rejected, n in (("p-0", 0), ("p-2", 2))
    ]
    with pytest.raises(DataError, match=r"found none among \d+ judgements of \d+ prompts; raise select.budget"):
        scalar_rows(tmp_path, judged[::2], tokens, loss="bradley_terry")


def test_the_labels_of_all_rounds_are_learnt_from(tmp_path):
    """Two rounds may give different responses the same id: texts tell them apart."""
    first = [judgement(f"p{n}", 0, float(n)) for n in range(3)]
    second = [dataclasses.replace(judgement("p0", 0, 5.0), response="another answer"), judgement("p7", 0, None)]
    rounds = [paid(tmp_path / "1", first), paid(tmp_path / "2", second)]
    assert training_judgements(open_run(tmp_path, "proxy"), rounds) == [*first, second[0]]
    tokens = {said: ids for of_round in rounds for said, ids in of_round.token_ids().items()}
    rows = scalar_rows(tmp_path, [first[0], second[0]], tokens)
    assert [(row["response_id"], row["score"]) for row in rows] == [("p0-0", 0.0), ("p0-0", 5.0)]
    assert tokens["p0", "another answer"] == [1, 0] and tokens["p2", "answer 0"] == [1, 2]


def test_too_few_labels_are_refused(tmp_path):
    with pytest.raises(DataError, match="at least 4 scored judgements, got 3"):
        run_with(tmp_path, "proxy", [*JUDGEMENTS[:3], judgement("z", 0, None)])
