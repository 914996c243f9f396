"""The label meter: what it says of labels whose worth is known, and that it says nothing that they do not tell."""

import json
from dataclasses import asdict, replace

import numpy as np
import pytest

from rayrl.algorithms.learning_curve import LearningCurve, concordance
from rayrl.algorithms.meter import (
    SHARES,
    Answer,
    LabelMeter,
    describe,
    label_meter,
    labels_text,
    read_meter,
    stops,
)

SIZES = np.array([20, 29, 43, 63, 93, 138, 203, 300])
WIDTH = 12


def curve_of(mean, error: float = 0.004) -> LearningCurve:
    """A learning curve with this mean, as measured on 400 labels."""
    mean = np.asarray(mean, np.float64)
    own = 0.6 * error * np.sqrt(SIZES[-1] / SIZES)
    return LearningCurve(
        sizes=SIZES,
        agreement=np.stack([mean, mean]),
        covariance=error**2 + np.diag(own**2),
        num_labels=400,
        num_prompts=200,
        num_held_out=50.0,
        prompt_variance=0.02,
        label_variance=0.01,
    )


def meter_of(mean, error: float = 0.004) -> LabelMeter:
    return read_meter(curve_of(mean, error), np.arange(400), compares=False)


def judged(num_prompts: int, *, seed: int, per_prompt: int = 2):
    """Scores whose best linear prediction is known: that by the true weights."""
    rng = np.random.default_rng([7, seed])
    groups = np.repeat(np.arange(num_prompts), per_prompt)
    vectors = rng.standard_normal((len(groups), WIDTH)).astype(np.float32)
    noise = rng.standard_normal(len(groups)) + 0.5 * rng.standard_normal(num_prompts)[groups]
    return vectors, vectors @ np.full(WIDTH, 1 / np.sqrt(WIDTH)) + noise, groups


def reachable_agreement() -> float:
    vectors, scores, groups = judged(800, seed=1000)
    counts = concordance(vectors.sum(1), scores, groups)
    return counts.agreed / counts.ordered


def test_the_answers_to_an_exponential_curve():
    meter = meter_of(0.75 - 0.2 * np.exp(-SIZES / 100))
    assert meter.reachable is not None and meter.agreement is not None and meter.next_gain is not None
    assert meter.reachable.is_known and meter.reachable.low <= 0.75 <= meter.reachable.high
    assert meter.agreement.low <= 0.75 - 0.2 * np.exp(-4) <= meter.agreement.high
    gain = 0.2 * (np.exp(-4) - np.exp(-5))
    assert meter.next_gain.is_known and meter.next_gain.low <= gain <= meter.next_gain.high
    for share in SHARES:
        answer, labels = meter.labels_for[f"{share:g}"], -100 * np.log((1 - share) * 0.25 / 0.2)
        assert answer.is_known and answer.low <= labels <= answer.high
    assert meter.share_reached is not None and meter.share_reached.is_known
    assert meter.share_reached.low <= 1 - 0.2 * np.exp(-4) / 0.25 <= meter.share_reached.high


def test_a_flat_curve_says_that_labels_are_not_known():
    for level, error in ((0.5, 0.01), (0.62, 0.02)):
        meter = meter_of(np.full(len(SIZES), level), error)
        assert meter.next_gain is not None and not meter.next_gain.is_known
        assert not any(answer.is_known for answer in meter.labels_for.values())
        assert "not known yet" in describe(meter) and not stops(meter, 0.8)


def test_a_falling_curve_says_so_too():
    meter = meter_of(0.7 - 0.0004 * SIZES)
    assert meter.next_gain is not None and not meter.next_gain.is_known and meter.next_gain.low == 0
    assert not any(answer.is_known for answer in meter.labels_for.values())


def test_a_curve_still_on_its_way_does_not_tell_where_to():
    meter = meter_of(0.5 + 0.0002 * SIZES)
    assert meter.reachable is not None and not meter.reachable.is_known
    assert meter.share_reached is not None and not meter.share_reached.is_known
    assert meter.next_gain is not None and meter.next_gain.is_known and meter.next_gain.low > 0.005
    assert not stops(meter, 0.8)


def test_the_meter_stops_when_its_interval_says_so():
    done = meter_of(0.75 - 0.2 * np.exp(-SIZES / 30))
    assert done.share_reached is not None and done.share_reached.low > 0.95
    assert stops(done, 0.95) and not stops(done, None)
    surely = replace(done.share_reached, value=0.99, low=0.94, high=1.0)
    assert not stops(replace(done, share_reached=surely), 0.95)
    assert stops(replace(done, share_reached=surely), 0.94)


def test_too_few_labels_are_said_to_be_too_few():
    meter = label_meter(*judged(10, seed=0))
    assert meter.family is None and not meter.measured and not meter.labels_for
    assert not stops(meter, 0.1)
    assert describe(meter) == (
        "meter: 20 judgements; not known yet: a curve takes 32 judgements of 16 prompts, and there are 20 of 10"
    )


def test_labels_that_are_all_alike_are_said_to_be_so():
    vectors, scores, groups = judged(40, seed=0)
    meter = label_meter(vectors, np.ones_like(scores), groups)
    assert describe(meter) == "meter: 80 judgements; not known yet: the 80 judgements are all alike"


def test_the_meter_in_one_line():
    meter = meter_of(0.75 - 0.2 * np.exp(-SIZES / 100))
    line = describe(meter)
    assert "\n" not in line
    assert line.startswith("meter: 400 judgements, agreement 0.7") and "of what is reachable; 95% takes 2" in line


@pytest.mark.parametrize(
    ("answer", "text"),
    [
        (Answer(value=1234.0, low=87.2, high=5678.0, is_known=True), "1,200 (87 to 5,700)"),
        (Answer(value=7.0, low=0.0, high=9.6, is_known=True), "7 (0 to 10)"),
        (Answer(value=7.0, low=312.0, high=np.inf, is_known=False), "not known yet, at least 310"),
        (Answer(value=7.0, low=0.0, high=np.inf, is_known=False), "not known yet"),
    ],
)
def test_numbers_of_labels_in_two_digits(answer, text):
    assert labels_text(answer) == text


def test_the_whole_meter_on_heads_whose_best_is_known():
    reachable, held, gains = reachable_agreement(), [], []
    for seed in range(16):
        meter = label_meter(*judged(100, seed=seed), num_splits=8, seed=seed)
        assert meter.reachable is not None and meter.next_gain is not None
        held.append(meter.reachable.low <= reachable <= meter.reachable.high)
        gains.append(meter.next_gain.low < 0.02)
    assert np.mean(held) >= 0.8
    assert all(gains)  # 200 labels of 12 dimensions are nearly enough


def test_comparisons_have_a_meter_too():
    vectors, scores, groups = judged(120, seed=0)
    differences, first_wins = vectors[::2] - vectors[1::2], scores[::2] > scores[1::2]
    meter = label_meter(differences, first_wins, groups[::2], compares=True, num_splits=6, num_heads=4)
    assert meter.compares and meter.unit == "comparisons" and meter.num_labels == 120
    assert meter.agreement is not None and 0.6 < meter.agreement.value < 0.9
    assert "meter: 120 comparisons, agreement 0." in describe(meter)


def test_bands_widen_away_from_the_measurements_and_hold_them():
    meter = label_meter(*judged(100, seed=0))
    assert meter.band[-1].num_labels == pytest.approx(800)
    for point in meter.band:
        assert point.new_low <= point.low <= point.agreement <= point.high <= point.new_high
    widths = [point.high - point.low for point in meter.band]
    assert widths[-1] > min(widths)
    assert all(
        any(point.new_low <= measured.agreement <= point.new_high for point in meter.band)
        for measured in meter.measured
    )


def test_a_meter_is_plain_values():
    meter = label_meter(*judged(40, seed=0), num_splits=4)
    assert json.loads(json.dumps(asdict(meter)))["num_labels"] == 80
