"""D: from a file as the policy reads it, or from comparisons, of which only clear ones make a pair."""

import json
import math
import uuid
from dataclasses import replace

import pytest

from rayrl.algorithms.acquisition import Answers
from rayrl.config import RunConfig
from rayrl.data.blocks import BlockTable
from rayrl.data.tokenizing import encode_prompt, encode_response, load_tokenizer
from rayrl.errors import DataError
from rayrl.records import Comparison, PreferencePair, Sampled, from_table, to_table
from rayrl.runs.run import Run, read_manifest
from rayrl.runs.stage_table import PREFERENCES, SELECT
from rayrl.stages.artifacts import Responses
from rayrl.stages.labelling.ask_pairs import count_answers, questions, verdict
from rayrl.stages.labelling.comparisons import (
    as_question,
    asked_before,
    draw_pairs,
    pair_texts,
    pairs_to_ask,
    preferred,
)
from rayrl.stages.labelling.preferences import read_preferences
from rayrl.stages.selection.select import num_possible_pairs, select
from tests.fakes import sampled


def run_in(folder, policy, preferences, max_model_len=None, **tables):
    """A run in a folder; `tables` are added to the few that it needs."""
    tree = {
        "name": "test",
        "run_dir": str(folder),
        "pipeline": "rlp",
        "policy": {"path": policy.path, "dtype": "float32", "max_model_len": max_model_len},
        "pool": {"path": str(folder / "pool.jsonl"), "num_eval": 2},
        "sft": {"enabled": False},
        "oracle": {"type": "scripted", "function": "tests.oracles.length_oracle:judge"},
        "preferences": preferences,
    }
    return Run(config=RunConfig.model_validate(tree | tables), url=str(folder))


def save(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def metrics_in(folder):
    manifest = read_manifest(str(folder), PREFERENCES)
    assert manifest is not None
    return manifest.metrics


def pairs_of(preferences):
    return [pair for block in preferences.table.blocks() for pair in from_table(block, PreferencePair)]


# From a file.


def from_file(folder, policy, rows, **tables):
    data = {"path": save(folder / "pairs.jsonl", rows)}
    run = run_in(folder, policy, {"data": data}, **tables)
    return read_preferences(run)


def test_pairs_of_a_file_are_what_the_policy_reads(tmp_path, tiny_policy):
    rows = [
        {"prompt": "Once upon", "chosen": " a time", "rejected": " no time"},
        {"prompt": "", "chosen": "x", "rejected": "y"},
        {"prompt": "Then", "chosen": "he ran.", "rejected": "she"},
        {"prompt": "Once upon", "chosen": " a hill", "rejected": " no time"},
    ]
    preferences = from_file(tmp_path, tiny_policy, rows, generate={"block_size": 2})
    first, second, third = pairs_of(preferences)
    assert (preferences.num_pairs, preferences.table.num_blocks) == (3, 2)
    run = run_in(tmp_path, tiny_policy, {"data": {"path": "unused"}})
    tokenizer = load_tokenizer(run.config.policy)
    assert first.prompt_token_ids == encode_prompt(tokenizer, "Once upon", "plain")
    assert first.chosen_token_ids == encode_response(tokenizer, " a time")
    assert first.rejected_token_ids[-1] == tokenizer.eos_token_id
    assert (second.prompt, second.chosen, second.rejected, second.source) == ("Then", "he ran.", "she", "data")
    assert first.prompt_id == third.prompt_id != second.prompt_id
    assert (third.chosen_id, third.rejected_id) == ("data-4-0", "data-4-1")
    unknown = (
        first.chosen_score,
        first.rejected_score,
        first.chosen_reference_logprob,
        first.rejected_reference_logprob,
    )
    assert all(map(math.isnan, unknown))
    metrics = metrics_in(tmp_path)
    file = metrics.file
    assert (metrics.num_pairs, file.num_prompts, file.num_unusable, file.num_truncated) == (3, 2, 1, 0)
    assert metrics.asked is None


def test_bad_rows_of_a_file_are_dropped_and_counted(tmp_path, tiny_policy):
    rows = [{"prompt": "Once", "chosen": "a dog.", "rejected": rejected} for rejected in ("a cat.", 7)]
    path = save(tmp_path / "pairs.jsonl", rows)
    read_preferences(run_in(tmp_path, tiny_policy, {"data": {"path": path, "on_bad_row": "drop"}}))
    metrics = metrics_in(tmp_path)
    assert (metrics.num_pairs, metrics.file.num_bad) == (1, 1)
    manifest = read_manifest(str(tmp_path), PREFERENCES)
    assert manifest is not None and ", 1 bad (the first: " in manifest.summary


def test_answers_are_cut_to_the_context_and_counted(tmp_path, tiny_policy):
    long = "the cat sat on the mat and " * 20
    rows = [
        {"prompt": "Once", "chosen": "a dog. " + long, "rejected": "a cat."},
        {"prompt": "Once", "chosen": long + "x", "rejected": long + "y"},
        {"prompt": long, "chosen": "a dog.", "rejected": "a cat."},
        {"prompt": "Once", "chosen": "a dog.", "rejected": "a cat."},
    ]
    preferences = from_file(tmp_path, tiny_policy, rows, max_model_len=32)
    cut, whole = pairs_of(preferences)
    assert len(cut.prompt_token_ids) + len(cut.chosen_token_ids) == 32
    assert cut.rejected_token_ids == whole.rejected_token_ids
    metrics = metrics_in(tmp_path)
    assert (metrics.file.num_truncated, metrics.file.num_same_when_cut, metrics.file.num_too_long) == (1, 1, 1)
    assert (metrics.num_pairs, preferences.num_pairs) == (2, 2)


def test_a_finished_stage_is_not_done_again(tmp_path, tiny_policy):
    rows = [{"prompt": "p", "chosen": "a", "rejected": "b"}, {"prompt": "q", "chosen": "a", "rejected": "b"}]
    first = from_file(tmp_path, tiny_policy, rows)
    files = {path: path.stat().st_mtime_ns for path in (tmp_path / "stages").rglob("*")}
    (tmp_path / "pairs.jsonl").unlink()
    run = run_in(tmp_path, tiny_policy, {"data": {"path": str(tmp_path / "pairs.jsonl")}})
    again = read_preferences(run)
    assert again == first
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "stages").rglob("*")} == files


def test_equal_answers_and_files_without_a_pair_are_refused(tmp_path, tiny_policy):
    with pytest.raises(DataError, match=r"must differ, and 1 pairs do not \(row 2\); remove those rows"):
        from_file(tmp_path, tiny_policy, [{"prompt": "p", "chosen": "a", "rejected": r} for r in ("b", "a")])
    with pytest.raises(DataError, match="leaves no pair: 1 rows read, 1 rows without a prompt or two answers"):
        from_file(tmp_path, tiny_policy, [{"prompt": "p", "chosen": "a", "rejected": ""}])
    assert not (tmp_path / "stages" / "preferences" / "manifest.json").exists()


# From comparisons.


def answered(pair, order, *preferences):
    """Answers of the oracle to the questions about a pair."""
    rest = {"key": "k", "oracle": "o", "rationale": "silent", "purpose": "label", "cost_usd": 0.0}
    return [
        replace(question, **rest, preference=preference, status="scored" if preference else "abstained")
        for question, preference in zip(questions(as_question(pair), order), preferences, strict=True)
    ]


def test_a_pair_is_drawn_by_the_seed_alone_and_in_either_order():
    drawn = [draw_pairs(sampled(4, f"p{i}"), seed)[0] for seed in (0, 1) for i in range(200)]
    assert drawn == [draw_pairs(sampled(4, f"p{i}"), seed)[0] for seed in (0, 1) for i in range(200)]
    places = [tuple(int(response.id[-1]) for response in pair.responses) for pair in drawn]
    assert all(a != b for a, b in places) and len(set(places)) == 12
    assert places[:200] != places[200:]
    assert 150 < sum(a < b for a, b in places) < 250


def test_pairs_of_a_prompt_share_no_response():
    for num, most, there in [(6, 2, 2), (6, 3, 3), (7, 9, 3), (2, 3, 1), (1, 3, 0)]:
        pairs = draw_pairs(sampled(num), 0, most)
        used = [response.id for pair in pairs for response in pair.responses]
        assert len(pairs) == there and len(used) == len(set(used)) == 2 * there


def prompts_asked_about(folder, policy, responses, preferences, **tables):
    """Ids of the prompts that `select` picks for comparisons."""
    run = run_in(folder, policy, preferences | {"source": "oracle"}, **tables)
    query_set = select(run, None, policy.checkpoint, responses)  # type: ignore[arg-type]
    return set(query_set.table.read(0)["prompt_id"].to_pylist())


@pytest.mark.parametrize(("budget", "num_prompts", "num_pairs"), [(5, 3, 5), (100, 4, 8)])
def test_as_many_pairs_are_asked_about_as_the_budget_pays_for(tmp_path, tiny_policy, budget, num_prompts, num_pairs):
    table = BlockTable(str(tmp_path / "responses"), 1)
    table.write(0, to_table([sampled(5, f"p{i}") for i in range(4)], Sampled))
    responses = Responses(key="y", table=table, num_prompts=4, num_responses=20)
    assert num_possible_pairs(responses, 2) == 8
    preferences = {"source": "oracle", "order": "random", "pairs_per_prompt": 2}
    tables = {"select": {"budget": budget, "strategy": "random"}, "generate": {"k": 5}}
    run = run_in(tmp_path, tiny_policy, preferences, **tables)
    query_set = select(run, None, tiny_policy.checkpoint, responses)  # type: ignore[arg-type]
    assert len(set(query_set.table.read(0)["prompt_id"].to_pylist())) == num_prompts
    pairs = pairs_to_ask(run, run.config.preferences, responses, query_set)
    assert len(pairs) == num_pairs
    assert {len(pair.responses) for pair in pairs} == {2}


@pytest.mark.parametrize("budget", [2, 100])
def test_only_prompts_with_two_responses_are_asked_about(tmp_path, tiny_policy, budget):
    table = BlockTable(str(tmp_path / "responses"), 2)
    for block in range(2):
        table.write(block, to_table([sampled(n, f"p{block}{n}-{i}") for n in range(4) for i in range(2)], Sampled))
    responses = Responses(key="y", table=table, num_prompts=16, num_responses=24)
    assert num_possible_pairs(responses, 1) == 8
    picked = prompts_asked_about(
        tmp_path,
        tiny_policy,
        responses,
        {"order": "random"},
        select={"budget": budget, "strategy": "random"},
        generate={"block_size": 8},
    )
    assert len(picked) == min(budget, 8) and all(int(prompt[2]) >= 2 for prompt in picked)


def test_all_pairs_that_were_paid_for_are_in_d(tmp_path, tiny_policy):
    """Refusals that cost nothing give their places to other pairs; none of those that were paid for is left out."""
    table = BlockTable(str(tmp_path / "responses"), 1)
    table.write(0, to_table([sampled(2, f"p{i}") for i in range(12)], Sampled))
    responses = Responses(key="y", table=table, num_prompts=12, num_responses=24)
    select_settings = {"budget": 6, "strategy": "random_pairs", "batches": 2}
    run = run_in(tmp_path, tiny_policy, {"source": "oracle", "order": "random"}, select=select_settings)
    answered: list[str] = []

    def refuses_every_third(rows):
        scores = [None if int(row["prompt_id"][1:]) % 3 == 0 else 1.0 for row in rows[::2]]
        answered.extend(row["prompt_id"] for row, score in zip(rows[::2], scores, strict=True) if score is not None)
        unpaid = [number for number, score in enumerate(scores) if score is None]
        return Answers(scores=scores, num_spent=len(scores) - len(unpaid), unpaid=unpaid)

    query_set = select(run, None, tiny_policy.checkpoint, responses, refuses_every_third)  # type: ignore[arg-type]
    pairs = pairs_to_ask(run, run.config.preferences, responses, query_set)
    assert sorted(pair.prompt_id for pair in pairs) == sorted(answered) and len(answered) == 6


def test_both_orders_are_two_questions_and_a_drawn_order_is_one():
    pair = draw_pairs(sampled(3), 0)[0]
    a, b = pair.responses
    both, one = questions(as_question(pair), "both"), questions(as_question(pair), "random")
    assert [(q.first_id, q.first, q.second_id, q.second) for q in both] == [
        (a.id, a.text, b.id, b.text),
        (b.id, b.text, a.id, a.text),
    ]
    assert one == both[:1]


def test_a_position_bias_makes_no_pair():
    pair = draw_pairs(sampled(2), 0)[0]
    assert verdict(answered(pair, "both", "first", "first")) == "tie"
    assert verdict(answered(pair, "both", "second", "first")) == "second"
    assert verdict(answered(pair, "both", "first", None)) is None
    assert verdict(answered(pair, "random", "first")) == "first"
    assert verdict(answered(pair, "random", None)) is None


@pytest.mark.parametrize(("winner", "place"), [("first", 0), ("second", 1)])
def test_a_preferred_response_is_chosen_whole(winner, place):
    pair = draw_pairs(sampled(3), 0)[0]
    won, lost = pair.responses[place], pair.responses[1 - place]
    made = preferred(pair, winner)
    assert (made.chosen_id, made.chosen, made.chosen_token_ids) == (won.id, won.text, won.token_ids)
    assert (made.rejected_id, made.rejected, made.rejected_token_ids) == (lost.id, lost.text, lost.token_ids)
    assert (made.chosen_reference_logprob, made.rejected_reference_logprob) == (won.logprob, lost.logprob)
    assert math.isnan(made.chosen_score) and math.isnan(made.rejected_score)
    assert (made.source, made.prompt_token_ids) == ("oracle", [1, 5])


def test_what_became_of_the_questions_is_counted():
    pair = draw_pairs(sampled(2), 0)[0]
    said = [("first", "second"), ("first", "first"), ("tie", "tie"), ("first", None), (None, None)]
    answers = [answered(pair, "both", *both) for both in said]
    counts = count_answers([a for both in answers for a in both], [verdict(both) for both in answers], "both")
    assert (counts.num_ties, counts.num_abstained, counts.num_disagreements) == (2, 2, 1)
    assert counts.first_position_share == 4 / 5
    assert counts.abstentions == {"silent": 3}
    single = [answered(pair, "random", None)[0]]
    counts = count_answers(single, [None], "random")
    assert (counts.num_disagreements, counts.first_position_share) == (0, None)


def test_a_pair_is_known_from_an_earlier_round_in_either_order_by_its_texts(tmp_path):
    asked = sampled(2)
    turned = replace(asked, responses=asked.responses[::-1])
    table = BlockTable(str(tmp_path), 1)
    table.write(0, to_table(answered(asked, "both", None, "tie"), Comparison))
    known = asked_before([table])
    assert pair_texts(asked) in known and pair_texts(turned) in known  # though nothing was decided
    assert pair_texts(sampled(2, "q")) not in known
    assert pair_texts(replace(asked, responses=sampled(3).responses[1:])) not in known
    assert asked_before([]) == set()


# With the policy and the oracle, on Ray.


class Fleets:
    """The two services that asking may use."""

    def __init__(self, generators, embedders):
        self._generators, self._embedders = generators, embedders

    def generators(self, checkpoint):
        return self._generators

    def embedders(self, checkpoint, pooling):
        return self._embedders

    def ready(self, fleet):
        return fleet

    def retire(self, fleet):
        pass  # the suite's, which others need


@pytest.fixture
def gather(generators, embedders, tiny_policy, tmp_path):
    """Runs the stage with a scripted oracle under a fresh pool; (D, the ledger's summary) of it."""
    import ray

    from rayrl.models.judge_prompt import load_rubric
    from rayrl.oracles.pool import start_oracle_pool
    from rayrl.pipelines.rlp import gather_preferences
    from rayrl.stages.sampling.pool import read_pool

    save(tmp_path / "pool.jsonl", [{"prompt": f"One day, {name} saw a"} for name in "ABCDEFGHIJ"])

    def gather(function, order, budget, **select):
        compare = f"tests.oracles.length_oracle:{function}"
        run = run_in(
            tmp_path,
            tiny_policy,
            {"source": "oracle", "order": order},
            select={"budget": budget} | select,
            generate={"k": 3, "max_tokens": 12, "block_size": 3},
            oracle={"type": "scripted", "function": "tests.oracles.length_oracle:judge", "compare_function": compare},
        )
        oracle = start_oracle_pool(
            f"preferences-{uuid.uuid4().hex[:8]}",
            run.config.oracle,
            rubric=load_rubric(run.config.rubric),
            ledger=str(tmp_path / "ledger.sqlite"),
            budgets={"label": budget},
        )
        try:
            services, m1 = Fleets(generators, embedders), tiny_policy.checkpoint
            preferences = gather_preferences(run, services, oracle, m1, read_pool(run), None)
            return preferences, ray.get(oracle.summary.remote())["label"]
        finally:
            ray.kill(oracle)

    return gather


def test_the_oracle_compares_responses_of_the_policy(gather, tmp_path):
    preferences, spent = gather("longer", "both", 9)
    assert spent.spent == spent.scored == 8  # four pairs, in both orders
    comparisons = comparisons_in(tmp_path)
    assert len(comparisons) == 8 and len({c.prompt_id for c in comparisons}) == 4
    for asked, turned in zip(comparisons[::2], comparisons[1::2], strict=True):
        assert (asked.first_id, asked.second_id) == (turned.second_id, turned.first_id)
        assert asked.first_id != asked.second_id and asked.first != asked.second
    pairs = pairs_of(preferences)
    assert len(pairs) == preferences.num_pairs > 0
    said = {response["id"]: response for row in responses_in(tmp_path) for response in row["responses"]}
    for pair in pairs:
        assert len(pair.chosen) > len(pair.rejected) and pair.source == "oracle"
        assert pair.chosen_reference_logprob == said[pair.chosen_id]["logprob"] < 0
        assert pair.rejected_token_ids == said[pair.rejected_id]["token_ids"]
    asked = metrics_in(tmp_path).asked
    assert asked.num_asked == 4 == len(pairs) + asked.counts.num_ties
    assert (asked.counts.num_abstained, asked.counts.num_disagreements, asked.num_spent) == (0, 0, 8)
    # The stage again, as after a kill before its manifest: nothing is paid again, and the outcome is the same.
    (tmp_path / "stages" / "preferences" / "manifest.json").unlink()
    again, spent = gather("longer", "both", 9)
    assert spent.spent == 8 and names(again) == names(preferences)


def test_one_drawn_order_of_every_prompt_is_asked_and_recorded(gather, tmp_path):
    preferences, spent = gather("whatever_comes_first", "random", 100)
    comparisons = comparisons_in(tmp_path)
    assert spent.spent == len(comparisons) == preferences.num_pairs == len(responses_in(tmp_path))
    assert {(c.first_id, c.second_id) for c in comparisons} == {
        (pair.chosen_id, pair.rejected_id) for pair in pairs_of(preferences)
    }
    assert metrics_in(tmp_path).asked.counts.first_position_share == 1.0
    with pytest.raises(DataError, match="the oracle preferred none: 8 ties, 0 abstentions"):
        gather("whatever_comes_first", "both", 100)


@pytest.mark.parametrize("order", ["random", "both"])
def test_pairs_are_chosen_in_batches_by_the_answers_to_earlier_ones(gather, tmp_path, monkeypatch, order):
    monkeypatch.setattr("rayrl.algorithms.acquisition.MIN_LABELS", 2)
    budget = 6 if order == "random" else 12
    settings = {"strategy": "delta_ucb", "first_batch": "random_pairs", "batches": 2}
    preferences, spent = gather("longer", order, budget, **settings)
    assert spent.spent == budget
    comparisons = comparisons_in(tmp_path)
    assert len({c.prompt_id for c in comparisons}) == 6 and len(comparisons) == budget
    manifest = read_manifest(str(tmp_path), SELECT)
    assert [batch.num_asked for batch in manifest.metrics.batches] == [3, 3]
    # What was asked about is what was chosen, and a run that was killed before its manifests pays nothing again.
    chosen = {
        row["response_id"] for row in BlockTable(str(tmp_path / "stages" / "select" / "table"), 1).read(0).to_pylist()
    }
    assert {c.first_id for c in comparisons} | {c.second_id for c in comparisons} == chosen
    for stage in ("select", "preferences"):
        (tmp_path / "stages" / stage / "manifest.json").unlink()
    again, spent = gather("longer", order, budget, **settings)
    assert spent.spent == budget and names(again) == names(preferences)


def names(preferences):
    return [(pair.chosen_id, pair.rejected_id) for pair in pairs_of(preferences)]


def comparisons_in(folder):
    return from_table(BlockTable(str(folder / "stages" / "preferences" / "comparisons"), 1).read(0), Comparison)


def responses_in(folder):
    import pyarrow.parquet as pq

    parts = sorted((folder / "stages" / "generate" / "table").glob("part-*.parquet"))
    return [row for part in parts for row in pq.read_table(part).to_pylist()]
