"""The expert compares a policy's responses: pairs to a prompt, asked in one order or in both, and what that makes.

The policy is M1, and in a later round the last one; its pairs then join those of the rounds before.
"""

import dataclasses
import math
import time
from collections.abc import Iterable, Iterator
from itertools import chain, islice

import pyarrow.compute as pc
from ray.actor import ActorHandle

from rayrl.algorithms.comparisons import num_disjoint, num_pairs_asked
from rayrl.data.blocks import BlockTable, write_blocks
from rayrl.errors import DataError
from rayrl.fleets.services import Services
from rayrl.oracles.pool import PairItem
from rayrl.records import (
    Checkpoint,
    Comparison,
    Preference,
    PreferencePair,
    Sampled,
    from_row,
    from_table,
    to_table,
)
from rayrl.runs.run import Manifest, Run
from rayrl.stages.artifacts import Preferences, Responses
from rayrl.stages.labelling.ask_pairs import ask_about, drawn, tally
from rayrl.stages.labelling.query import spending
from rayrl.stages.selection.select import select


def compare_responses(
    run: Run,
    services: Services,
    oracle: ActorHandle,
    policy: Checkpoint,
    responses: Responses,
    key: str,
    earlier: Preferences | None,
) -> Manifest:
    """Draw pairs, ask about them, keep every comparison (table `comparisons`) and the pairs they decide (`table`).

    Pairs of the rounds before are not asked about again, and go before the new ones in the table.

    Raises:
        DataError: the expert decided nothing.
    """
    started = time.monotonic()
    preferences = run.config.preferences
    assert preferences is not None, "the config is refused without preferences"
    order = preferences.order
    there = pairs_of_prompts(responses, preferences.pairs_per_prompt)
    num_without = there.count(0)
    num_pairs = num_pairs_asked(run.config.select.budget, order, sum(there))
    two = drawn_pairs(run, chosen(run, services, policy, responses, num_pairs, sum(there)), num_pairs)
    known = asked_before(earlier.compared if earlier else ())
    pairs = [pair for pair in two if texts_of(pair) not in known]
    answers, verdicts = ask_about(oracle, [in_order(p) for p in pairs], order, "label", describe="asking the expert")
    BlockTable(run.folder("preferences", "comparisons"), 1).write(0, to_table(answers, Comparison))
    decided = zip(pairs, verdicts, strict=True)
    made = [preferred(pair, winner) for pair, winner in decided if winner in ("first", "second")]
    before = (pair for block in earlier.table.blocks() for pair in from_table(block, PreferencePair)) if earlier else ()
    table, num_pairs = write_blocks(
        run.folder("preferences", "table"), chain(before, made), PreferencePair, run.config.generate.block_size
    )
    counts = tally(answers, verdicts, order)
    if num_pairs == 0:
        raise DataError(
            f"preferences: of {len(pairs)} pairs of responses the expert preferred none: {counts['num_ties']} ties, "
            f"{counts['num_abstained']} abstentions {counts['abstentions']}, and {num_without} prompts "
            "without two different responses; see stages/preferences/comparisons, and mend the expert, raise "
            "select.budget, or raise generate.k or generate.temperature for more different responses"
        )
    summary = spending(oracle, answers)
    metrics = {"source": "oracle", "num_pairs": num_pairs, "num_blocks": table.num_blocks, "order": order}
    metrics |= {"num_asked": len(pairs), "num_without_two_responses": num_without} | counts | summary
    if earlier:
        metrics |= {"num_new_pairs": len(made), "num_asked_before": len(two) - len(pairs)}
    return run.finish(
        "preferences",
        key,
        since=started,
        num_rows=num_pairs,
        metrics=metrics,
        summary=f"{len(made)} pairs from {len(answers)} comparisons of {len(pairs)} pairs of responses; "
        f"{counts['num_ties']} ties, {counts['num_abstained']} abstentions, {summary['label']['cost_usd']:.2f} USD"
        + (f"; {num_pairs} with those of earlier rounds" if earlier else ""),
    )


def texts_of(pair: Sampled) -> tuple[str, frozenset[str]]:
    """What a pair is about, whatever its order."""
    return pair.prompt_id, frozenset(response.text for response in pair.responses)


def asked_before(compared: Iterable[BlockTable]) -> set[tuple[str, frozenset[str]]]:
    """What the comparisons of earlier rounds were about, decided or not."""
    columns = ["prompt_id", "first", "second"]
    rows = (row for table in compared for block in table.blocks() for row in block.select(columns).to_pylist())
    return {(row["prompt_id"], frozenset((row["first"], row["second"]))) for row in rows}


def pairs_of_prompts(responses: Responses, pairs_per_prompt: int) -> list[int]:
    """How many disjoint pairs of different responses each prompt has to ask about."""
    lengths = (pc.list_value_length(block["responses"]) for block in responses.table.blocks())  # type: ignore[attr-defined]
    return [num_disjoint(length, pairs_per_prompt) for of_block in lengths for length in of_block.to_pylist()]


def chosen(
    run: Run, services: Services, policy: Checkpoint, responses: Responses, num_asked: int, num_there: int
) -> Iterator[Sampled]:
    """The prompts that are asked about: all with two responses, or those `select` picks, if the budget is for fewer.

    The selection works on prompts here whatever `select.unit` says: a pair needs two responses to one prompt.
    """
    config = run.config
    assert config.preferences is not None
    wanted: set[str] | None = None
    if num_asked < num_there:
        num_prompts = math.ceil(num_asked / config.preferences.pairs_per_prompt)
        whole = config.select.model_copy(update={"unit": "prompt", "budget": num_prompts * config.generate.k})
        by_prompt = dataclasses.replace(run, config=config.model_copy(update={"select": whole}))
        query_set = select(by_prompt, services, policy, responses)
        wanted = set(query_set.table.read(0)["prompt_id"].to_pylist())
    for block in responses.table.blocks():
        for row in block.to_pylist():
            if len(row["responses"]) >= 2 and (wanted is None or row["prompt_id"] in wanted):
                yield from_row(row, Sampled)


def drawn_pairs(run: Run, prompts: Iterable[Sampled], num_pairs: int) -> list[Sampled]:
    """At most `num_pairs` pairs of these prompts' responses."""
    assert run.config.preferences is not None
    most = run.config.preferences.pairs_per_prompt
    pairs = chain.from_iterable(draw_pairs(sampled, run.config.seed, most) for sampled in prompts)
    return list(islice(pairs, num_pairs))


def draw_pairs(sampled: Sampled, seed: int, most: int = 1) -> list[Sampled]:
    """Disjoint pairs of a prompt's (distinct) responses in a random order, a function of the seed."""
    responses = sorted(sampled.responses, key=lambda said: drawn(seed, said.id))
    num = num_disjoint(len(responses), most)
    return [dataclasses.replace(sampled, responses=responses[2 * i : 2 * i + 2]) for i in range(num)]


def in_order(pair: Sampled) -> PairItem:
    """A drawn pair as a question."""
    first, second = pair.responses
    return PairItem(
        prompt_id=pair.prompt_id,
        first_id=first.id,
        second_id=second.id,
        prompt=pair.prompt,
        first=first.text,
        second=second.text,
    )


def preferred(pair: Sampled, winner: Preference) -> PreferencePair:
    """The pair with its winner chosen. There are no scores; the policy's log-probabilities are generation's."""
    row = dataclasses.asdict(pair)
    first, second = row["responses"]
    chosen, rejected = (first, second) if winner == "first" else (second, first)
    return PreferencePair.of_responses(row, chosen, rejected, source="oracle")
