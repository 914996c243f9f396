"""Label meter of a run: its answered questions and their vectors, as the run directory has them, and what they tell.

Costs nothing and starts nothing, Ray included. Vectors are those of the selection, which a run has if something of it
reads them; a vector stands for one response, or the responses to a prompt could not be told apart.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import numpy as np
from jaxtyping import Float32

from rayrl.algorithms.comparisons import agreed
from rayrl.algorithms.meter import (
    CHANCE,
    NOT_KNOWN,
    NUM_NEXT,
    SHARES,
    Answer,
    LabelMeter,
    gain_text,
    label_meter,
    labels_text,
    too_few,
    value_text,
)
from rayrl.algorithms.selection import STRATEGIES
from rayrl.data.blocks import found_table
from rayrl.errors import DataError
from rayrl.fleets.coreset import vectors_of
from rayrl.records import Comparison, Judgement, Preference, from_table
from rayrl.report.recorded_run import RecordedRun
from rayrl.report.tables import read_parquet
from rayrl.runs import storage
from rayrl.runs.stage_table import EMBEDDINGS, PREFERENCES, QUERY, SELECT, Stage

Vectors = dict[str, Float32[np.ndarray, " d"]]
"""Of responses of one round, by their ids."""
R = TypeVar("R", Judgement, Comparison)

ENOUGH = 0.9
"""Share of what is reachable after which more labels are said to add little."""


def run_meter(run: RecordedRun) -> LabelMeter:
    """Read the meter on all labels of a run.

    Raises:
        DataError: the run has no answers yet, or no vectors of the responses that were asked about.
    """
    if run.has(QUERY):
        return _of_judgements(run)
    if run.config.asks_for_comparisons:
        return _of_comparisons(run)
    raise DataError(
        f"{run.url} asks the oracle for no labels, and the label meter reads those that a run has paid for; name a run "
        "that asks for judgements or comparisons"
    )


def found_meter(run: RecordedRun) -> LabelMeter | None:
    """Read the meter for the report; None where the run has nothing to read it from."""
    try:
        return run_meter(run)
    except DataError:
        return None


def _of_judgements(run: RecordedRun) -> LabelMeter:
    vectors: list[Float32[np.ndarray, " d"]] = []
    scores: list[float] = []
    prompts: list[str] = []
    for number, judgements in _answers(run, QUERY, "table", Judgement):
        found = _vectors(run, number, {judgement.response_id for judgement in judgements})
        for judgement in judgements:
            if judgement.score is not None:
                vectors.append(found[judgement.response_id])
                scores.append(judgement.score)
                prompts.append(judgement.prompt_id)
    groups = np.unique(prompts, return_inverse=True)[1]
    return label_meter(_stacked(run, vectors), np.array(scores), groups, seed=run.config.seed)


def _of_comparisons(run: RecordedRun) -> LabelMeter:
    differences: list[Float32[np.ndarray, " d"]] = []
    first_wins: list[bool] = []
    prompts: list[str] = []
    for number, comparisons in _answers(run, PREFERENCES, "comparisons", Comparison):
        responses = {response for each in comparisons for response in (each.first_id, each.second_id)}
        found = _vectors(run, number, responses)
        for (prompt, first, second), preference in _decided(comparisons).items():
            differences.append(found[first] - found[second])
            first_wins.append(preference == "first")
            prompts.append(prompt)
    groups = np.unique(prompts, return_inverse=True)[1]
    return label_meter(_stacked(run, differences), np.array(first_wins), groups, compares=True, seed=run.config.seed)


def _decided(comparisons: Sequence[Comparison]) -> dict[tuple[str, str, str], Preference]:
    """Return the preferences that are no ties, by prompt and responses; pairs that were asked in both orders once."""
    known: dict[tuple[str, str, str], Preference] = {}
    for comparison in comparisons:
        assert comparison.preference is not None, "a scored comparison has its preference"
        pair = (comparison.prompt_id, comparison.first_id, comparison.second_id)
        turned = (comparison.prompt_id, comparison.second_id, comparison.first_id)
        if turned in known:
            known[turned] = agreed(known[turned], comparison.preference) or "tie"
        else:
            known[pair] = comparison.preference
    return {pair: preference for pair, preference in known.items() if preference != "tie"}


def _answers(run: RecordedRun, stage: Stage, table: str, record: type[R]) -> Iterator[tuple[int, list[R]]]:
    """Yield the answered questions of every round that has them, with its number."""
    is_empty = True
    for number in run.rounds():
        rows = read_parquet(run.stage_folder(stage, number, table))
        answers = [] if rows is None else [row for row in from_table(rows, record) if row.status == "scored"]
        if answers:
            is_empty = False
            yield number, answers
    if is_empty:
        raise DataError(
            f"{run.url} has no answers of the oracle in its stage {stage.name} yet; the command that started the run "
            "continues it"
        )


def _vectors(run: RecordedRun, number: int, response_ids: set[str]) -> Vectors:
    """Read the vectors of some responses from the selection of a round."""
    chosen = read_parquet(run.stage_folder(SELECT, number, "table"))
    rows = [] if chosen is None else chosen.select(["ordinal", "response_id"]).to_pylist()
    ordinals = {row["response_id"]: int(row["ordinal"]) for row in rows if row["response_id"] in response_ids}
    if not response_ids <= ordinals.keys():
        raise _no_vectors(run)
    if len(set(ordinals.values())) < len(ordinals) or run.config.select.text == "prompt":
        raise DataError(
            f"{run.url} has a vector per prompt, by which the label meter cannot tell the prompt's "
            'responses apart; run with select.unit = "response" and select.text = "prompt_response", and in rlp with '
            "a strategy that chooses pairs"
        )
    by_ordinal = _newest_vectors(run, number, set(ordinals.values()))
    return {response: by_ordinal[ordinal] for response, ordinal in ordinals.items()}


def _newest_vectors(run: RecordedRun, number: int, ordinals: set[int]) -> dict[int, Float32[np.ndarray, " d"]]:
    """Read vectors by ordinal. Those of earlier selections may lie beside: the newest that has all of them counts."""
    written: dict[str, float] = {}
    for path, at in storage.times(run.stage_folder(SELECT, number)).items():
        folder = path.partition("/")[0]
        if folder.startswith(EMBEDDINGS):
            written[folder] = max(at, written.get(folder, 0.0))
    for folder in sorted(written, key=lambda folder: written[folder], reverse=True):
        found: dict[int, Float32[np.ndarray, " d"]] = {}
        for block in found_table(run.stage_folder(SELECT, number, folder)).blocks():
            if block.num_rows:
                ids, vectors = vectors_of(block)
                rows = np.flatnonzero(np.isin(ids, list(ordinals)))
                found |= dict(zip(ids[rows].tolist(), vectors[rows], strict=True))
        if len(found) == len(ordinals):
            return found
    raise _no_vectors(run)


def _no_vectors(run: RecordedRun) -> DataError:
    strategy = run.config.select.strategy
    if STRATEGIES[strategy].reads_vectors:
        return DataError(
            f"{run.url} has no vectors of the responses that were asked about: they are not in its stage "
            f"{SELECT.name}, from which a budget for all responses, or a removed folder, leaves them out; the label "
            "meter needs a run that embeds its responses, with a smaller select.budget"
        )
    readers = ", ".join(name for name, found in STRATEGIES.items() if found.reads_vectors)
    return DataError(
        f"{run.url} has no vectors: select.strategy = {strategy!r} embeds nothing, and the label meter learns on "
        f"vectors of the responses that were asked about; run with a strategy that reads vectors ({readers}), with "
        f'reuse = "{run.url}" for what stays the same'
    )


def _stacked(run: RecordedRun, vectors: Sequence[Float32[np.ndarray, " d"]]) -> Float32[np.ndarray, "n d"]:
    widths = sorted({len(vector) for vector in vectors})
    if len(widths) > 1:
        raise DataError(
            f"{run.url} has vectors of different widths, {widths[0]} and {widths[-1]}: its rounds embedded with "
            "different models; name a run with one select.embedder"
        )
    return np.stack(vectors)


def advice(meter: LabelMeter) -> str:
    """Write the sentence that a user acts on."""
    if meter.agreement is None or meter.share_reached is None or meter.next_gain is None:
        return f"What more labels would buy is {NOT_KNOWN}: {too_few(meter)}."
    labels = f"{meter.num_labels:,} {meter.unit}"
    if meter.agreement.low <= CHANCE:
        return (
            f"What is reachable is {NOT_KNOWN}: {labels} order held-out pairs no better than chance, as far as they "
            "tell. More labels may show more, and so may other vectors (select.embedder, select.text)."
        )
    gain = meter.next_gain
    buys = f"the next {NUM_NEXT} add {gain_text(gain) if gain.is_known else f'at most {gain.high:+.3f}'}"
    if not meter.share_reached.is_known:
        return (
            f"How much of what is reachable {labels} have reached is {NOT_KNOWN}; {buys}. Twice as many will tell more."
        )
    reached = f"{labels} have reached {value_text(meter.share_reached, '.0%')} of what is reachable"
    if meter.share_reached.low >= ENOUGH:
        return f"{reached}: more would add little; {buys}."
    return f"{reached}; {buys}."


def meter_rows(meter: LabelMeter) -> list[list[str]]:
    """Write the answers as rows of a table."""

    def row(name: str, answer: Answer | None, show: Callable[[Answer], str]) -> list[str]:
        return [name, NOT_KNOWN if answer is None else show(answer)]

    def agreement(answer: Answer) -> str:
        return value_text(answer, ".3f")

    rows = [
        [meter.unit, f"{meter.num_labels:,}"],
        ["of prompts", f"{meter.num_prompts:,}"],
        row("agreement with the oracle", meter.agreement, agreement),
        row("reachable", meter.reachable, agreement),
        row("reached of what is reachable", meter.share_reached, lambda answer: value_text(answer, ".0%")),
    ]
    for share in SHARES:
        rows.append(row(f"labels that {share:.0%} of it takes", meter.labels_for.get(f"{share:g}"), labels_text))
    rows.append(row(f"the next {NUM_NEXT} labels add", meter.next_gain, gain_text))
    return rows
