"""Stage select: the responses that the oracle is asked about, picked by a strategy under the round's budget.

Strategies are pure functions (`rayrl.algorithms.selection.STRATEGIES`). This stage gives them what they read: ordinals,
or the coreset service, whose actors own the vectors. Where the budget covers everything there is, nothing is picked.
With `select.batches` the answers to one batch decide the next, so that this stage asks as it picks; the stage that
follows finds the answers in the ledger. The answers of each batch are kept: what was refused for nothing may be
answered another time, and a run that goes on must choose by what it was told.
"""

import logging
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from ray.exceptions import RayActorError

from rayrl.algorithms.acquisition import Acquisition, Answers, Labels, acquire, meter_labels, num_choosable
from rayrl.algorithms.comparisons import num_disjoint, num_pairs_asked
from rayrl.algorithms.meter import describe, stops
from rayrl.algorithms.selection import ROUTED, STRATEGIES, Knowledge, Selection
from rayrl.data.blocks import BlockTable
from rayrl.fleets.coreset import RayShards
from rayrl.fleets.services import Services
from rayrl.models.judge_prompt import load_rubric
from rayrl.records import Checkpoint
from rayrl.runs import storage
from rayrl.runs.run import KeyPart, Run
from rayrl.runs.stage_metrics import BatchMetrics, SelectMetrics
from rayrl.runs.stage_table import SELECT
from rayrl.stages.artifacts import QueryRow, QuerySet, Responses
from rayrl.stages.rewards.evaluator import Evaluator
from rayrl.stages.selection.embedding import embed, embedding_of, seed_centers
from rayrl.stages.selection.entropies import score_entropies
from rayrl.stages.selection.ordinals import numbering
from rayrl.stages.selection.projection import write_projection

logger = logging.getLogger(__name__)

MAX_ATTEMPTS = 3
"""A dead shard forgets its distances: the selection, which takes seconds, starts again so often."""
ANSWERED = "answered-"
"""In the stage's folder: the batches that were asked about, named by the selection that they are of."""
MAX_RADII = 200
"""Points of the covering radius that are kept for the report, about."""

QUERY_SCHEMA = pa.schema(
    [pa.field("ordinal", pa.int64(), nullable=False)]
    + [pa.field(name, pa.string(), nullable=False) for name in ("prompt_id", "response_id", "prompt", "response")]
    + [pa.field("token_ids", pa.list_(pa.field("item", pa.int64(), nullable=False)), nullable=False)]
)


@dataclass(frozen=True, kw_only=True)
class Chosen:
    """The picks, and how they came about."""

    selection: Selection
    batches: list[BatchMetrics] = field(default_factory=list)
    num_unspent: int = 0
    is_enough: bool = False
    num_embedded: int | None = None
    embed_s: float | None = None


AskBatch = Callable[[list[QueryRow]], Answers]
"""Asks about the rows of one batch; of pairs, two rows follow each other."""


def select(
    run: Run,
    services: Services,
    policy: Checkpoint,
    responses: Responses,
    ask: AskBatch | None = None,
    evaluator: Evaluator | None = None,
) -> QuerySet:
    """Pick Q: the responses, or whole prompts, whose labels teach most.

    Args:
        run: the round; its budget bounds the picks.
        services: fleets; embedders, for a strategy that reads vectors.
        policy: embeds, where the policy is the embedder.
        responses: what may be picked.
        ask: asks about one batch of chosen responses at once, where `select.batches` is 2 or more: the next batch is
            chosen by its answers. They are kept, so that a run that goes on chooses as if it had not been interrupted.
        evaluator: of the round before, for a strategy that reads it; None in the first round.
    """
    config = run.config
    if not config.select.reads_evaluator:
        evaluator = None
    key = run.key(SELECT, *_inputs(run, responses), *([evaluator.key] if evaluator is not None else []))
    query_set = QuerySet(key=key, table=BlockTable(run.folder(SELECT, "table"), 1))
    if run.finished(SELECT, key):
        return query_set
    started = time.monotonic()
    num_wanted = num_units_wanted(run, responses)
    name = config.select.strategy
    chosen = Chosen(selection=Selection(ids=[]))
    entropies = None
    if num_wanted is None:
        chosen, name = Chosen(selection=Selection(ids=list(_ordinals(run, responses)))), "all"
    elif num_wanted == 0:
        name = "none"  # a later round may have nothing left to spend, after calls that were lost
    else:
        if evaluator is not None:
            entropies = score_entropies(run, services, evaluator, responses)
        elif config.select.reads_evaluator:
            name = str(config.select.first_batch)
        acquisition = acquisition_of(run, entropies)
        if config.embeds_pool:
            chosen = _select_by_vectors(run, key, services, policy, responses, num_wanted, acquisition, ask)
        else:
            ids = np.fromiter(_ordinals(run, responses), np.int64)
            chosen = _choose(run, key, responses, ids, None, num_wanted, acquisition, ask)
    radii = chosen.selection.radii
    rows = list(_rows_of(run, responses, chosen.selection.ids))
    query_set.table.write(0, pa.Table.from_pylist(rows, schema=QUERY_SCHEMA))
    run.finish(
        SELECT,
        key,
        since=started,
        num_rows=len(rows),
        metrics=SelectMetrics(
            strategy=name,
            num_selected=len(rows),
            num_candidates=responses.num_responses,
            radius=[round(radius, 5) for radius in radii[:: max(1, len(radii) // MAX_RADII)]],
            batches=chosen.batches,
            num_unspent=chosen.num_unspent,
            is_enough=chosen.is_enough,
            num_embedded=chosen.num_embedded,
            embed_s=chosen.embed_s,
            num_unread=None if entropies is None else int(np.isnan(entropies).sum()),
        ),
        summary=f"{len(rows)} of {responses.num_responses} responses by {name}"
        + (f" in {len(chosen.batches)} batches" if chosen.batches else "")
        + (f"; {chosen.num_unspent} not asked: select.stop_at is reached" if chosen.is_enough else ""),
    )
    return query_set


def _inputs(run: Run, responses: Responses) -> list[KeyPart]:
    """List all that decides the picks."""
    config = run.config
    paired = config.preferences if config.asks_for_comparisons else None
    # The budget of this round and not of all: a longer run takes over what a shorter one has paid for.
    settings = config.select.science_json(exclude=frozenset({"budget"}))
    inputs = [settings, *run.content("select."), *(run.content("seed_data.") if config.select.seed_centers else [])]
    wording = load_rubric(config.rubric).version
    # In batches the picks follow the oracle's answers.
    oracle = [config.oracle] if config.select.batches > 1 else []
    return [
        *inputs,
        run.budget,
        wording,
        responses.key,
        config.labels in ("expert", "routed") and config.labels,
        paired,
        *oracle,
    ]


def num_units_wanted(run: Run, responses: Responses) -> int | None:
    """Return how many responses, or prompts, the round's budget is for; None if it takes everything there is.

    More than there are may be wanted: the strategy then gets what there is.
    """
    config = run.config
    if config.labels == "expert":
        return None
    if config.asks_for_comparisons:
        assert config.preferences is not None
        num_possible = num_possible_pairs(responses, config.preferences.pairs_per_prompt)
        num_asked = num_pairs_asked(run.budget, config.preferences.order, num_possible)
        if config.select.asks == "pairs":
            return num_asked  # of each prompt one pair, and which one matters even where all prompts are asked about
        # All prompts with two responses are asked about, unless the budget is for fewer pairs than they have.
        return math.ceil(num_asked / config.preferences.pairs_per_prompt) if num_asked < num_possible else None
    # A prompt costs the judgements of all its k responses.
    wanted = run.budget if config.select.unit == "response" else run.budget // config.generate.k
    return min(wanted, responses.num_responses)


def num_possible_pairs(responses: Responses, pairs_per_prompt: int) -> int:
    """Count the disjoint pairs of different responses that the prompts have, at most so many per prompt."""
    total = 0
    for block in responses.table.blocks():
        lengths = pc.list_value_length(block["responses"])  # type: ignore[attr-defined]
        total += sum(num_disjoint(length, pairs_per_prompt) for length in lengths.to_pylist())
    return total


def _ordinals(run: Run, responses: Responses) -> Iterator[int]:
    """Yield the ordinals of all units, block by block."""
    numbers = numbering(run.config)
    for block in range(responses.table.num_blocks):
        for row, sampled in enumerate(responses.table.read(block).column("responses").to_pylist()):
            for ordinal, _ in numbers.units(block, row, len(sampled)):
                yield ordinal


def _select_by_vectors(
    run: Run,
    key: str,
    services: Services,
    policy: Checkpoint,
    responses: Responses,
    num_wanted: int,
    acquisition: Acquisition,
    ask: AskBatch | None,
) -> Chosen:
    """Embed all units, and pick on the shards."""
    config = run.config
    embedding = embedding_of(run, services, policy, embedder=config.select.embedder, normalize=config.select.normalize)
    started = time.monotonic()
    vectors, num_units = embed(run, embedding, responses)
    embed_s = time.monotonic() - started
    if config.select.seed_centers:
        knowledge = replace(acquisition.knowledge, initial_centers=seed_centers(run, embedding))
        acquisition = replace(acquisition, knowledge=knowledge)
    # In rlp every training runs beside all fleets that are up, so a fleet that only selects has to go.
    if config.pipeline == "rlp" and not config.selects_by_rewarders:
        services.retire(embedding.fleet)
    ids = np.fromiter(_ordinals(run, responses), np.int64, num_units)
    for attempt in range(1, MAX_ATTEMPTS + 1):
        # A name of its own for each attempt: Ray may not have let go of the dead shard's yet.
        name = f"{config.name}-coreset{'-again' * (attempt - 1)}"
        shards = RayShards(name, vectors, config.select.num_shards)
        try:
            chosen = _choose(run, key, responses, ids, shards, num_wanted, acquisition, ask)
            break
        except RayActorError as error:
            if attempt == MAX_ATTEMPTS:
                raise
            logger.warning("select: a shard died (%s); selecting again", error)
        finally:
            shards.stop()
    else:
        raise AssertionError("unreachable")
    write_projection(run.folder(SELECT, "projection.parquet"), vectors, set(chosen.selection.ids))
    return replace(chosen, num_embedded=num_units, embed_s=embed_s)


def acquisition_of(run: Run, entropies: np.ndarray | None = None) -> Acquisition:
    """Return how a round's labels are chosen.

    Args:
        run: the round.
        entropies: of the scores by the evaluator of the round before, by rising ordinal; None without one.
    """
    config, select = run.config, run.config.select
    strategy = STRATEGIES[select.strategy]
    first = None if select.first_batch is None else STRATEGIES[select.first_batch]
    if config.labels == "routed":
        strategy, first = ROUTED, strategy
    elif strategy.reads_evaluator:
        assert first is not None, "the config is refused without a strategy for the first round"
        strategy, first = first if entropies is None else strategy, None
    return Acquisition(
        strategy=strategy,
        first=first,
        num_batches=select.batches,
        num_heads=select.num_heads,
        confidence=select.sure_at,
        knowledge=Knowledge(
            seed=run.seed,
            entropies=entropies,
            prompt_stride=numbering(config).per_prompt,
            candidate_batch=select.candidate_batch,
        ),
    )


def _choose(
    run: Run,
    key: str,
    responses: Responses,
    ids: np.ndarray,
    shards: RayShards | None,
    num_wanted: int,
    acquisition: Acquisition,
    ask: AskBatch | None,
) -> Chosen:
    """Pick at once, or batch by batch."""
    select = run.config.select
    strategy, knowledge = acquisition.strategy, acquisition.knowledge
    if select.batches == 1:
        pool = shards if strategy.reads_vectors else ids
        num_possible = num_choosable(ids, strategy, knowledge)
        return Chosen(selection=strategy.choose(pool, min(num_wanted, num_possible), knowledge))
    assert ask is not None, "whoever selects in batches asks"
    batches = _kept_batches(run, key)
    verdicts = [False]  # of the label meter
    labels = Labels()
    for batch in batches:
        labels = labels.with_answers(batch.questions, batch.answers.scores)

    def ask_chosen(questions: np.ndarray) -> Answers:
        answers = ask(list(_rows_of(run, responses, questions.ravel().tolist())))
        batch = Batch(questions=questions, answers=answers)
        storage.write_json(run.folder(SELECT, f"{ANSWERED}{key}-{len(batches)}.json"), batch.as_json())
        batches.append(batch)
        logger.info("select: batch %d: %d of %d answered", len(batches), batch.num_scored, len(questions))
        return answers

    def is_enough(labels: Labels) -> bool:
        if shards is not None:
            meter = meter_labels(shards, labels, knowledge)
            logger.info("select: %s", describe(meter))
            verdicts.append(stops(meter, select.stop_at))
        return verdicts[-1]

    def num_left() -> int:
        return num_wanted - sum(batch.answers.num_spent for batch in batches)

    if num_left() > 0 and not (batches and is_enough(labels)):
        rest = replace(acquisition, num_batches=max(1, select.batches - len(batches)))
        acquire(ids, shards, rest, num_left(), ask_chosen, known=labels, stop=is_enough)
    # What was refused for nothing is no part of Q: its place was given to another.
    chosen = [row for batch in batches for row in batch.paid_questions().ravel().tolist()]
    metrics = [BatchMetrics(num_asked=len(batch.questions), num_scored=batch.num_scored) for batch in batches]
    return Chosen(
        selection=Selection(ids=chosen),
        batches=metrics,
        num_unspent=num_left(),
        is_enough=verdicts[-1] and num_left() > 0,
    )


@dataclass(frozen=True, kw_only=True)
class Batch:
    """One batch of questions and what came of it. Kept, so that a run that goes on chooses by the same answers."""

    questions: np.ndarray
    """Ordinals, (m, 1) of responses or (m, 2) of pairs."""
    answers: Answers

    @property
    def num_scored(self) -> int:
        """Questions that were answered."""
        return sum(score is not None for score in self.answers.scores)

    def paid_questions(self) -> np.ndarray:
        """Return the questions that were answered, or at least paid for."""
        return np.delete(self.questions, list(self.answers.unpaid), axis=0)

    def as_json(self) -> dict[str, Any]:
        """Return what `_kept_batches` reads."""
        return {
            "questions": self.questions.tolist(),
            "scores": list(self.answers.scores),
            "num_spent": self.answers.num_spent,
            "unpaid": list(self.answers.unpaid),
        }


def _kept_batches(run: Run, key: str) -> list[Batch]:
    """Read the batches that this selection has asked about before it was interrupted, in their order."""
    batches: list[Batch] = []
    while storage.exists(place := run.folder(SELECT, f"{ANSWERED}{key}-{len(batches)}.json")):
        kept = storage.read_json(place)
        answers = Answers(scores=kept["scores"], num_spent=kept["num_spent"], unpaid=kept["unpaid"])
        batches.append(Batch(questions=np.array(kept["questions"], np.int64), answers=answers))
    return batches


def _rows_of(run: Run, responses: Responses, ordinals: list[int]) -> Iterator[QueryRow]:
    """Yield the chosen responses in the order of the picks; only blocks that hold one are read."""
    numbers = numbering(run.config)
    # Blocks are read in their own order, the rows are given in that of the picks.
    wanted = set(ordinals)
    found: dict[int, list[QueryRow]] = {}
    for block in sorted({numbers.block_of(ordinal) for ordinal in ordinals}):
        for row, sampled in enumerate(responses.table.read(block).to_pylist()):
            for ordinal, index in numbers.units(block, row, len(sampled["responses"])):
                if ordinal not in wanted:
                    continue
                chosen = sampled["responses"] if index is None else [sampled["responses"][index]]
                found[ordinal] = [
                    QueryRow(
                        ordinal=ordinal,
                        prompt_id=sampled["prompt_id"],
                        response_id=response["id"],
                        prompt=sampled["prompt"],
                        response=response["text"],
                        token_ids=sampled["prompt_token_ids"] + response["token_ids"],
                    )
                    for response in chosen
                ]
    for ordinal in ordinals:
        yield from found[ordinal]
