"""Stage query: ask the expert about the chosen responses, under the budget. The ledger makes a rerun free."""

import logging
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.exceptions import GetTimeoutError

from rayrl.data.blocks import BlockTable
from rayrl.errors import StageTimeout
from rayrl.metrics.progress import track
from rayrl.models.judge_prompt import load_rubric
from rayrl.oracles.pool import PairItem
from rayrl.records import Comparison, Judgement, content_id, to_table
from rayrl.runs.run import Run
from rayrl.stages.artifacts import Judgements, QuerySet

logger = logging.getLogger(__name__)

CHUNK = 64
CHUNK_TIMEOUT_S = 6 * 3600.0
"""A chunk may wait for rate limits and retries; the pool bounds each call itself."""


def expert_of(run: Run) -> str:
    """Who judges, and by which wording: a part of the key of whatever has the expert judge."""
    return run.key("expert", run.config.oracle, load_rubric(run.config.rubric).version)


def query(run: Run, oracle: ActorHandle, query_set: QuerySet) -> Judgements:
    """E: the expert's judgements of the query set. Costs budget."""
    key = run.key("query", query_set.key, expert_of(run))
    judgements = Judgements(key=key, table=BlockTable(run.folder("query", "table"), 1), asked=query_set.table)
    if run.finished("query", key):
        return judgements
    started = time.monotonic()
    items = [
        {name: row[name] for name in ("prompt_id", "response_id", "prompt", "response")}
        for row in query_set.table.read(0).to_pylist()
    ]
    answers = ask(oracle, items, "label", describe="asking the expert")
    judgements.table.write(0, to_table(answers, Judgement))
    summary = spending(oracle, answers)
    histogram = Counter(str(round(j.score)) for j in answers if j.score is not None)
    reasons = Counter(j.rationale[:80] for j in answers if j.score is None)
    run.finish(
        "query",
        key,
        since=started,
        num_rows=len(answers),
        metrics=summary | {"score_histogram": dict(histogram), "abstentions": dict(reasons.most_common(5))},
        summary=f"{summary['label']['spent']} of {summary['label']['budget']} queries spent, "
        f"{histogram.total()} scored, {reasons.total()} abstained, {summary['label']['cost_usd']:.2f} USD",
    )
    return judgements


def ask(oracle: ActorHandle, items: list[dict[str, Any]], purpose: str, *, describe: str) -> list[Judgement]:
    """Have the oracle pool judge items, chunk by chunk, with a progress bar.

    Raises:
        StageTimeout: a chunk took hours.
    """
    return _collect([oracle.judge.remote(chunk, purpose) for chunk in _chunks(items)], describe)


def expert_scores(oracle: ActorHandle, texts: Sequence[tuple[str, str, str]], *, describe: str) -> list[float | None]:
    """The expert's scores of (prompt id, prompt, response), out of the evaluation's budget; None where it abstains."""
    items = [
        {"prompt_id": of, "response_id": content_id(of, said), "prompt": prompt, "response": said}
        for of, prompt, said in texts
    ]
    return [judgement.score for judgement in ask(oracle, items, "evaluate", describe=describe)]


def compare(oracle: ActorHandle, items: list[PairItem], purpose: str, *, describe: str) -> list[Comparison]:
    """Have the oracle pool compare items, as `ask` has it judge them."""
    return _collect([oracle.compare.remote(chunk, purpose) for chunk in _chunks(items)], describe)


def spending(oracle: ActorHandle, answers: Sequence[Judgement | Comparison]) -> dict[str, Any]:
    """The ledger's summary, and what these answers took of the label budget (`num_spent`)."""
    summary: Any = ray.get(oracle.summary.remote())
    num_spent: Any = ray.get(oracle.num_spent.remote([answer.key for answer in answers], "label"))
    return summary | {"num_spent": num_spent}


def _chunks(items: list[Any]) -> Iterator[list[Any]]:
    return (items[start : start + CHUNK] for start in range(0, len(items), CHUNK))


def _collect(pending: list[Any], describe: str) -> list[Any]:
    answers: list[Any] = []
    for chunk in track(pending, describe):
        try:
            answers += ray.get(chunk, timeout=CHUNK_TIMEOUT_S)
        except GetTimeoutError:
            raise StageTimeout(
                f"query: the oracle pool gave no answer in {CHUNK_TIMEOUT_S / 3600:.0f} h; see its log"
            ) from None
    return answers
