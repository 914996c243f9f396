"""The label meter of a run: which labels and vectors it reads, what it says, and what it refuses."""

import dataclasses
import os
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rayrl.algorithms.meter import Answer, LabelMeter
from rayrl.errors import DataError
from rayrl.records import Comparison, from_table, to_table
from rayrl.report.label_meter import advice, found_meter, meter_rows, run_meter
from rayrl.report.recorded_run import read_run
from tests.report.made_up_runs import (
    PART,
    edit_config,
    leave_ppo_alone,
    write_comparisons,
    write_judgements,
    write_vectors,
)


def meter_of(run_dir) -> LabelMeter:
    return run_meter(read_run(str(run_dir)))


def refusal(run_dir) -> str:
    with pytest.raises(DataError) as refused:
        meter_of(run_dir)
    assert found_meter(read_run(str(run_dir))) is None
    return str(refused.value)


def known(value: float, low: float, high: float) -> Answer:
    return Answer(value=value, low=low, high=high, is_known=True)


def not_known(low: float, high: float) -> Answer:
    return Answer(value=low, low=low, high=high, is_known=False)


METER = LabelMeter(
    compares=False,
    num_labels=240,
    num_prompts=200,
    family="power law",
    agreement=known(0.684, 0.65, 0.71),
    reachable=known(0.71, 0.68, 0.75),
    share_reached=known(0.88, 0.7, 1.0),
    labels_for={"0.8": known(150, 40, 260), "0.9": known(320, 90, 900), "0.95": not_known(130, np.inf)},
    next_gain=known(0.011, 0.002, 0.019),
)


def test_judgements_are_read_with_the_vectors_of_their_responses(run_dir):
    write_judgements(run_dir)
    meter = meter_of(run_dir)
    assert (meter.num_labels, meter.num_prompts, meter.compares) == (95, 48, False)  # one of 96 is an abstention
    assert meter.agreement is not None and meter.agreement.value > 0.75


def test_judgements_of_all_rounds_count(run_dir):
    write_judgements(run_dir)
    edit_config(run_dir, rounds=3)
    write_judgements(run_dir / "rounds" / "2", 30, seed=1)  # ids of responses repeat from round to round
    meter = meter_of(run_dir)
    assert (meter.num_labels, meter.num_prompts) == (95 + 59, 48)
    assert meter.agreement is not None and meter.agreement.value > 0.75


def test_comparisons_are_read_as_differences(rlp_run_dir):
    write_comparisons(rlp_run_dir)
    meter = meter_of(rlp_run_dir)
    assert (meter.num_labels, meter.num_prompts, meter.compares) == (56, 56, True)  # eight of 64 are ties
    assert meter.agreement is not None and meter.agreement.value > 0.7


def test_pairs_that_were_asked_in_both_orders_count_once(rlp_run_dir):
    write_comparisons(rlp_run_dir)
    expected = meter_of(rlp_run_dir)
    path = rlp_run_dir / "stages" / "preferences" / "comparisons" / "part-00000.parquet"
    asked = from_table(pq.read_table(path), Comparison)
    other = {"first": "second", "second": "first", "tie": "first"}  # what was a tie in one order stays one
    turned = [
        dataclasses.replace(
            each, first_id=each.second_id, second_id=each.first_id, preference=other[each.preference or "tie"]
        )
        for each in asked
    ]
    pq.write_table(to_table([*asked, *turned], Comparison), path)
    assert meter_of(rlp_run_dir) == expected
    disagreeing = dataclasses.replace(turned[1], preference=asked[1].preference)  # the position decided
    pq.write_table(to_table([*asked, turned[0], disagreeing, *turned[2:]], Comparison), path)
    assert meter_of(rlp_run_dir).num_labels == expected.num_labels - 1


def test_vectors_of_other_selections_that_lie_beside_are_passed_over(run_dir):
    write_judgements(run_dir)
    expected = meter_of(run_dir)
    rng = np.random.default_rng(5)
    others = {f"p{prompt}-{index}": rng.standard_normal(6) for prompt in range(48) for index in range(2)}
    # Older vectors of the same responses, and newer ones of others.
    write_vectors(run_dir, others, name="embeddings-older")
    for part in (run_dir / "stages" / "select" / "embeddings-older").iterdir():
        os.utime(part, (1e9, 1e9))
    write_vectors(run_dir, others, name="embeddings-newer", shift=1)
    assert meter_of(run_dir) == expected


def test_a_strategy_that_embeds_nothing_is_refused_with_the_remedy(run_dir):
    write_judgements(run_dir)
    shutil.rmtree(run_dir / "stages" / "select" / "embeddings-0")
    edit_config(run_dir, select={"strategy": "random"})
    message = refusal(run_dir)
    assert "has no vectors: select.strategy = 'random' embeds nothing" in message
    assert "run with a strategy that reads vectors (k_center" in message and f'reuse = "{run_dir}"' in message


def test_removed_vectors_are_missed(run_dir):
    write_judgements(run_dir)
    shutil.rmtree(run_dir / "stages" / "select" / "embeddings-0")
    assert "has no vectors of the responses that were asked about" in refusal(run_dir)


def test_a_query_set_of_other_responses_is_missed(run_dir):
    write_judgements(run_dir)
    write_vectors(run_dir, {"q-0": np.ones(6), "q-1": np.zeros(6)})
    assert "has no vectors of the responses that were asked about" in refusal(run_dir)


def test_vectors_of_prompts_are_refused(rlp_run_dir, run_dir):
    write_judgements(run_dir)
    edit_config(run_dir, select={"text": "prompt"})
    assert "has a vector per prompt" in refusal(run_dir)
    write_comparisons(rlp_run_dir)
    chosen = rlp_run_dir / "stages" / "select" / PART
    table = pq.read_table(chosen)
    shared = pa.array([ordinal // 128 * 128 for ordinal in table["ordinal"].to_pylist()], pa.int64())
    pq.write_table(table.set_column(0, "ordinal", shared), chosen)
    assert "has a vector per prompt" in refusal(rlp_run_dir)


def test_rounds_of_different_widths_are_refused(run_dir):
    write_judgements(run_dir)
    edit_config(run_dir, rounds=2)
    write_judgements(run_dir / "rounds" / "2", 30, seed=1)
    wider = {f"p{prompt}-{index}": np.ones(8) for prompt in range(30) for index in range(2)}
    write_vectors(run_dir / "rounds" / "2", wider)
    assert "vectors of different widths, 6 and 8" in refusal(run_dir)


def test_a_run_without_answers_is_refused(run_dir):
    write_judgements(run_dir, status="abstained")
    assert "has no answers of the oracle in its stage query yet" in refusal(run_dir)
    shutil.rmtree(run_dir / "stages" / "query")
    assert "has no answers of the oracle in its stage query yet" in refusal(run_dir)


def test_a_run_that_asks_for_no_labels_is_refused(rlp_run_dir):
    leave_ppo_alone(rlp_run_dir, "function")
    assert "asks the oracle for no labels" in refusal(rlp_run_dir)


def test_the_table_has_every_answer():
    assert dict(meter_rows(METER)) == {
        "judgements": "240",
        "of prompts": "200",
        "agreement with the oracle": "0.684 (0.650 to 0.710)",
        "reachable": "0.710 (0.680 to 0.750)",
        "reached of what is reachable": "88% (70% to 100%)",
        "labels that 80% of it takes": "150 (40 to 260)",
        "labels that 90% of it takes": "320 (90 to 900)",
        "labels that 95% of it takes": "not known yet, at least 130",
        "the next 100 labels add": "+0.011 (+0.002 to +0.019)",
    }
    empty = LabelMeter(compares=True, num_labels=8, num_prompts=8)
    assert [value for _, value in meter_rows(empty)] == ["8", "8", *["not known yet"] * 7]


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({}, "240 judgements have reached 88% (70% to 100%) of what is reachable; the next 100 add +0.011 (+0.002 to "),
        (
            {"share_reached": known(0.97, 0.92, 1.0)},
            "240 judgements have reached 97% (92% to 100%) of what is reachable: more would add little; the next 100 ",
        ),
        (
            {"share_reached": not_known(0.3, 1.0), "next_gain": not_known(0.0, 0.03)},
            "How much of what is reachable 240 judgements have reached is not known yet; the next 100 add at most "
            "+0.030. Twice as many will tell more.",
        ),
        (
            {"agreement": known(0.51, 0.47, 0.55)},
            "What is reachable is not known yet: 240 judgements order held-out pairs no better than chance",
        ),
    ],
)
def test_the_sentence_that_a_user_acts_on(changes, sentence):
    assert advice(dataclasses.replace(METER, **changes)).startswith(sentence)


def test_the_sentence_of_too_few_labels():
    assert advice(LabelMeter(compares=False, num_labels=8, num_prompts=8)) == (
        "What more labels would buy is not known yet: a curve takes 32 judgements of 16 prompts, and there are 8 of 8."
    )
