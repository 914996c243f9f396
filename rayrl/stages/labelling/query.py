"""Stage query: ask the oracle about the chosen responses, under the budget. The ledger makes a rerun free."""

import time
from collections import Counter

from ray.actor import ActorHandle

from rayrl.algorithms.acquisition import Answers
from rayrl.data.blocks import BlockTable
from rayrl.models.judge_prompt import load_rubric
from rayrl.records import Judgement, to_table
from rayrl.runs.run import Run
from rayrl.runs.stage_metrics import QueryMetrics
from rayrl.runs.stage_table import QUERY
from rayrl.stages.artifacts import Judgements, QueryRow, QuerySet
from rayrl.stages.labelling.ask import abstention_reasons, ask, ledger_counts, num_spent, unpaid_questions
from rayrl.stages.selection.select import AskBatch


def oracle_key(run: Run) -> str:
    """Name the oracle and the rubric by which it judges: a part of the key of every stage that has it judge."""
    return run.key("oracle", run.config.oracle, load_rubric(run.config.rubric).version)


def asking(oracle: ActorHandle) -> AskBatch:
    """Ask about the responses that a selection in batches picks, one batch at a time, out of the label budget."""

    def ask_batch(rows: list[QueryRow]) -> Answers:
        answers = ask(oracle, [_as_question(row) for row in rows], QUERY, describe="asking the oracle")
        scores = [answer.score for answer in answers]
        # An answer that another run has paid for counts as one: the picks are the same with and without that run.
        unpaid = unpaid_questions(oracle, [[answer] for answer in answers])
        return Answers(scores=scores, num_spent=len(scores) - len(unpaid), unpaid=unpaid)

    return ask_batch


def query(run: Run, oracle: ActorHandle, query_set: QuerySet) -> Judgements:
    """Ask for E: the oracle's judgements of the query set. Costs label budget."""
    key = run.key(QUERY, query_set.key, oracle_key(run))
    judgements = Judgements(key=key, table=BlockTable(run.folder(QUERY, "table"), 1), query_set=query_set)
    if run.finished(QUERY, key):
        return judgements
    started = time.monotonic()
    questions = [_as_question(row) for row in query_set.rows()]
    answers = ask(oracle, questions, QUERY, describe="asking the oracle")
    judgements.table.write(0, to_table(answers, Judgement))
    # Abstentions are kept in the table, and they are never trained on.
    scores = [answer.score for answer in answers if answer.score is not None]
    ledger = ledger_counts(oracle)
    metrics = QueryMetrics(
        # Of these questions alone: a ledger counts those of all rounds.
        num_spent=num_spent(oracle, answers),
        num_scored=len(scores),
        num_abstained=len(answers) - len(scores),
        score_histogram=dict(Counter(str(round(score)) for score in scores)),
        abstentions=abstention_reasons([answer.rationale for answer in answers if answer.score is None]),
        ledger=ledger,
    )
    label = ledger["label"]
    run.finish(
        QUERY,
        key,
        since=started,
        num_rows=len(answers),
        metrics=metrics,
        summary=f"{label.spent} of {label.budget} queries spent, {metrics.num_scored} scored, "
        f"{metrics.num_abstained} abstained, {label.price()}",
    )
    return judgements


def _as_question(row: QueryRow) -> Judgement:
    return Judgement(
        prompt_id=row["prompt_id"], response_id=row["response_id"], prompt=row["prompt"], response=row["response"]
    )
