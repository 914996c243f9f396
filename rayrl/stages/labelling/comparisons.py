"""Stage preferences, by the oracle: pairs of a policy's responses are compared, and the decided ones are D.

The policy is M1, and in a later round the last one; the new pairs then join those of the rounds before. A pair is asked
about in one drawn order or in both (`preferences.order`).
"""

import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, replace
from itertools import chain, islice

from ray.actor import ActorHandle

from rayrl.algorithms.acquisition import TIE, Answers
from rayrl.algorithms.comparisons import TURNED, num_disjoint, num_pairs_asked, queries_per_pair
from rayrl.config import PreferencesConfig
from rayrl.data.blocks import BlockTable, write_blocks
from rayrl.errors import DataError
from rayrl.models.judge_prompt import load_rubric
from rayrl.models.pairwise_prompt import pairwise_version
from rayrl.records import Comparison, Preference, PreferencePair, Sampled, from_row, from_table, to_table
from rayrl.runs.run import Manifest, Run
from rayrl.runs.stage_metrics import AskedPairs, PreferencesMetrics
from rayrl.runs.stage_table import PREFERENCES
from rayrl.stages.artifacts import Preferences, QueryRow, QuerySet, Responses
from rayrl.stages.labelling.ask import ledger_counts, num_spent, unpaid_questions
from rayrl.stages.labelling.ask_pairs import ask_about, count_answers, drawn, in_drawn_order, pair_question
from rayrl.stages.selection.select import AskBatch, num_possible_pairs

WON: dict[Preference, float] = {"first": 1.0, "second": 0.0, "tie": TIE}
"""Answer to a pair, as heads learn it."""
PairTexts = tuple[str, frozenset[str]]
"""Prompt id and the two texts of a pair, whatever their order."""


def compare(
    run: Run, oracle: ActorHandle, responses: Responses, query_set: QuerySet, earlier: Preferences | None = None
) -> Preferences:
    """Ask for D: the oracle's comparisons of the responses to the chosen prompts. Costs label budget.

    Args:
        run: the round; its budget bounds the questions.
        oracle: compares.
        responses: of the policy.
        query_set: the prompts that are asked about.
        earlier: D of the rounds before. Its pairs are not asked about again, and go before the new ones.

    Raises:
        DataError: the oracle decided nothing.
    """
    config = run.config
    wording = pairwise_version(load_rubric(config.rubric))
    inputs = [responses.key, query_set.key] + ([earlier.key] if earlier else [])
    key = run.key(PREFERENCES, config.preferences, config.oracle, wording, *inputs)
    done = run.finished(PREFERENCES, key) or _compare(run, oracle, responses, query_set, earlier, key)
    asked = BlockTable(run.folder(PREFERENCES, "comparisons"), 1)
    return Preferences(
        key=key,
        table=BlockTable(run.folder(PREFERENCES, "table"), done.metrics.num_blocks),
        num_pairs=done.metrics.num_pairs,
        comparisons=(*(earlier.comparisons if earlier else ()), asked),
    )


def pairs_to_ask(run: Run, config: PreferencesConfig, responses: Responses, query_set: QuerySet) -> list[Sampled]:
    """Draw pairs of responses to the chosen prompts, as many as the round's budget pays for."""
    select = run.config.select
    prompts = _chosen_prompts(responses, query_set)
    # Drawn lazily: no pairs are made beyond what the budget pays for.
    candidates = chain.from_iterable(draw_pairs(sampled, run.seed, config.pairs_per_prompt) for sampled in prompts)
    if select.asks == "pairs" and select.batches > 1:
        return list(candidates)  # these are asked about already, within the budget
    num_possible = num_possible_pairs(responses, config.pairs_per_prompt)
    return list(islice(candidates, num_pairs_asked(run.budget, config.order, num_possible)))


def _compare(
    run: Run,
    oracle: ActorHandle,
    responses: Responses,
    query_set: QuerySet,
    earlier: Preferences | None,
    key: str,
) -> Manifest[PreferencesMetrics]:
    """Draw pairs, ask, and keep every comparison (table `comparisons`) and the pairs they decide (`table`)."""
    started = time.monotonic()
    config = run.config.preferences
    assert config is not None, "the config is refused without preferences"
    drawn_pairs = pairs_to_ask(run, config, responses, query_set)
    # A later round may draw the same texts again, under other ids.
    known = asked_before(earlier.comparisons if earlier else ())
    new_pairs = [pair for pair in drawn_pairs if pair_texts(pair) not in known]

    questions = [as_question(pair) for pair in new_pairs]
    answers, verdicts = ask_about(oracle, questions, config.order, PREFERENCES, describe="asking the oracle")
    BlockTable(run.folder(PREFERENCES, "comparisons"), 1).write(0, to_table(answers, Comparison))
    counts = count_answers(answers, verdicts, config.order)

    decided = [
        preferred(pair, verdict)
        for pair, verdict in zip(new_pairs, verdicts, strict=True)
        if verdict in ("first", "second")
    ]
    # Those of earlier rounds first, one block in memory at a time.
    pairs = chain(_pairs_of(earlier), decided)
    url = run.folder(PREFERENCES, "table")
    table, num_pairs = write_blocks(url, pairs, PreferencePair, run.config.generate.block_size)
    num_without_two = _num_without_two_responses(responses)
    if num_pairs == 0:
        raise DataError(
            f"preferences: of {len(new_pairs)} pairs of responses the oracle preferred none: {counts.num_ties} ties, "
            f"{counts.num_abstained} abstentions {counts.abstentions}, and {num_without_two} prompts "
            "without two different responses; see stages/preferences/comparisons, and mend the oracle, raise "
            "select.budget, or raise generate.k or generate.temperature for more different responses"
        )
    asked = AskedPairs(
        order=config.order,
        num_asked=len(new_pairs),
        num_asked_before=len(drawn_pairs) - len(new_pairs),
        num_without_two_responses=num_without_two,
        num_new_pairs=len(decided),
        num_spent=num_spent(oracle, answers),
        counts=counts,
        ledger=ledger_counts(oracle),
    )
    return run.finish(
        PREFERENCES,
        key,
        since=started,
        num_rows=num_pairs,
        metrics=PreferencesMetrics(num_pairs=num_pairs, num_blocks=table.num_blocks, asked=asked),
        summary=f"{len(decided)} pairs from {len(answers)} comparisons of {len(new_pairs)} pairs of responses; "
        f"{counts.num_ties} ties, {counts.num_abstained} abstentions, {asked.ledger['label'].price()}"
        + (f"; {num_pairs} with those of earlier rounds" if earlier else ""),
    )


def asking_pairs(run: Run, oracle: ActorHandle) -> AskBatch:
    """Ask about the pairs that a selection in batches picks, one batch at a time, out of the label budget."""
    config = run.config.preferences
    assert config is not None, "the config is refused without preferences"

    def ask_batch(rows: list[QueryRow]) -> Answers:
        pairs = list(zip(rows[::2], rows[1::2], strict=True))
        asked = [_drawn_question(run.seed, *pair) for pair in pairs]
        answers, verdicts = ask_about(oracle, asked, config.order, PREFERENCES, describe="asking the oracle")
        scores: list[float | None] = []
        for (first, _), question, decided in zip(pairs, asked, verdicts, strict=True):
            is_turned = first["response_id"] != question.first_id
            scores.append(None if decided is None else WON[TURNED[decided] if is_turned else decided])
        size = queries_per_pair(config.order)
        unpaid = unpaid_questions(oracle, [answers[start : start + size] for start in range(0, len(answers), size)])
        return Answers(scores=scores, num_spent=len(scores) - len(unpaid), unpaid=unpaid)

    return ask_batch


def _chosen_prompts(responses: Responses, query_set: QuerySet) -> Iterator[Sampled]:
    """Yield the chosen prompts with their chosen responses, in the order of the responses table."""
    chosen = {(row["prompt_id"], row["response_id"]) for row in query_set.rows()}
    for block in responses.table.blocks():
        for row in block.to_pylist():
            row["responses"] = [r for r in row["responses"] if (row["prompt_id"], r["id"]) in chosen]
            if row["responses"]:
                yield from_row(row, Sampled)


def _pairs_of(earlier: Preferences | None) -> Iterator[PreferencePair]:
    if earlier is not None:
        for block in earlier.table.blocks():
            yield from from_table(block, PreferencePair)


def _num_without_two_responses(responses: Responses) -> int:
    blocks = responses.table.blocks()
    return sum(len(prompt_responses) < 2 for block in blocks for prompt_responses in block["responses"].to_pylist())


def pair_texts(pair: Sampled) -> PairTexts:
    """Return what a pair is about, whatever its order."""
    return pair.prompt_id, frozenset(response.text for response in pair.responses)


def asked_before(comparisons: Iterable[BlockTable]) -> set[PairTexts]:
    """Read what the comparisons of earlier rounds were about, decided or not."""
    known: set[PairTexts] = set()
    for table in comparisons:
        for block in table.blocks():
            for row in block.select(["prompt_id", "first", "second"]).to_pylist():
                known.add((row["prompt_id"], frozenset((row["first"], row["second"]))))
    return known


def draw_pairs(sampled: Sampled, seed: int, num_pairs: int = 1) -> list[Sampled]:
    """Draw disjoint pairs of a prompt's (distinct) responses: a function of the seed and their ids."""
    # A drawn order, in which neighbours are paired: every pair and either order of it is as likely.
    responses = sorted(sampled.responses, key=lambda response: drawn(seed, response.id))
    num = num_disjoint(len(responses), num_pairs)
    return [replace(sampled, responses=responses[2 * i : 2 * i + 2]) for i in range(num)]


def as_question(pair: Sampled) -> Comparison:
    """Put a drawn pair as a question, in its drawn order."""
    return pair_question(pair.prompt_id, pair.prompt, [(response.id, response.text) for response in pair.responses])


def _drawn_question(seed: int, a: QueryRow, b: QueryRow) -> Comparison:
    """Put a chosen pair as a question, in the order in which `draw_pairs` has it."""
    sides = [(row["response_id"], row["response"]) for row in (a, b)]
    return pair_question(a["prompt_id"], a["prompt"], in_drawn_order(seed, *sides))


def preferred(pair: Sampled, winner: Preference) -> PreferencePair:
    """Make the preference pair of a decided one. There are no scores; the log-probabilities are generation's."""
    row = asdict(pair)
    first, second = row["responses"]
    chosen, rejected = (first, second) if winner == "first" else (second, first)
    return PreferencePair.of_responses(row, chosen, rejected, source="oracle")
