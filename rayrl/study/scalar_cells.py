"""Cells of a study of labels whose evaluator is trained: M1 with a scalar head, as a run fits it.

A cell is chosen and measured as any other. Its training uses the whole cluster, so that cells follow each other. All of
them train in the folder of one run, by that run's stage: a cell which was interrupted goes on from its checkpoint.
"""

# pyarrow has no type stubs.
# pyright: reportMissingTypeStubs=false, reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false

import logging
import math
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
from jaxtyping import Float64, Int64
from ray.actor import ActorHandle

from rayrl.config import RunConfig
from rayrl.data.blocks import BlockTable
from rayrl.pipelines.run_pipeline import Running, running
from rayrl.pipelines.stopping import Stopping
from rayrl.preflight import check
from rayrl.records import Checkpoint, Judgement, ResponseKey, Scored, to_table
from rayrl.runs import storage
from rayrl.stages.artifacts import Judgements, QuerySet
from rayrl.stages.policy.sft import sft
from rayrl.stages.proxy.fit_evaluator import fit_evaluator
from rayrl.study.label_cells import Job, measure_cell
from rayrl.study.labels import asking
from rayrl.study.pool import StudyPool
from rayrl.study.pool_stages import pool_responses
from rayrl.study.results import Outcome, outcome_of
from rayrl.study.scheduling import FATAL

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Texts:
    """A response of the pool, as an evaluator is trained on it and reads it."""

    prompt_id: str
    response_id: str
    item: Scored


@dataclass(frozen=True, kw_only=True)
class ScalarFits:
    """The run in whose folder the cells train, with M1 and the texts of the pool."""

    now: Running
    m1: Checkpoint
    texts: Mapping[str, Texts]
    """By the id of the response."""

    @classmethod
    @contextmanager
    def started(
        cls, config: RunConfig, budgets: Mapping[str, int], stopping: Stopping | None
    ) -> "Generator[ScalarFits]":
        """Open the run, whose oracle may be asked as often as the study may; end its fleets and its oracle."""
        plan = replace(check(config), budgets=budgets)
        with running(config, plan, stopping=stopping) as now:
            texts: dict[str, Texts] = {}
            for block in pool_responses(now).table.blocks():
                for row in block.to_pylist():
                    for response in row["responses"]:
                        tokens = row["prompt_token_ids"] + response["token_ids"]
                        item = Scored(prompt=row["prompt"], response=response["text"], token_ids=tokens)
                        texts[response["id"]] = Texts(prompt_id=row["prompt_id"], response_id=response["id"], item=item)
            yield cls(now=now, m1=sft(now.run, now.services), texts=texts)

    @property
    def oracle(self) -> ActorHandle:
        """The pool that asks."""
        return self.now.oracle

    def run_jobs(
        self,
        jobs: Sequence[Job],
        pools: Mapping[str, StudyPool],
        response_ids: Sequence[str],
        labels: Any,
        study_dir: str,
    ) -> Iterator[Outcome]:
        """Run cells one after the other, and yield their outcomes. A cell that fails ends no other.

        Args:
            jobs: the cells.
            pools: by key.
            response_ids: of the pools' rows.
            labels: the actor that answers.
            study_dir: where results go.

        Raises:
            JudgeFailed and others of `FATAL`: no cell could go on.
        """
        for number, job in enumerate(jobs, 1):
            logger.info("cell %d of %d: %s", number, len(jobs), job.cell.title)
            measure = partial(measure_cell, job, pools[job.pool], asking(labels), partial(self._fitted, response_ids))
            yield outcome_of(job.cell, job.key, study_dir, measure, fatal=FATAL)

    def _fitted(
        self,
        response_ids: Sequence[str],
        pool: StudyPool,
        rows: Int64[np.ndarray, "n 1"],
        scores: Float64[np.ndarray, " n"],
        job: Job,
    ) -> Float64[np.ndarray, " all"]:
        """Train on the labels, a part of which the stage holds back for its validation; score the held-out responses.

        NaN of a response that is too long for the evaluator, and of those that no measure reads.
        """
        # The seed of the cell draws the order of the training and what is held back.
        config = self.now.run.config
        run = replace(self.now.run, config=RunConfig.model_validate(config.model_dump() | {"seed": job.cell.seed}))
        judged = [self.texts[response_ids[int(row)]] for row in rows[:, 0]]
        judgements = self._judgements(judged, scores, job)
        evaluator = fit_evaluator(run, self.now.services, self.m1, [judgements])
        assert evaluator is not None, "refused before: a base config that fits no evaluator"
        held_out = np.flatnonzero(pool.held_out(job.held_out, job.split_seed))
        items = [self.texts[response_ids[int(row)]].item for row in held_out]
        found = evaluator.serve(self.now.services).score(items)
        predicted = np.full(len(pool.ids), math.nan)
        predicted[held_out] = [math.nan if score is None else score for score in found]
        return predicted

    def _judgements(self, judged: Sequence[Texts], scores: Float64[np.ndarray, " n"], job: Job) -> Judgements:
        """Lay a cell's labels down as the judgements that the stage reads."""
        records = [
            Judgement(
                prompt_id=each.prompt_id,
                response_id=each.response_id,
                prompt=each.item.prompt,
                response=each.item.response,
                status="scored",
                score=float(score),
            )
            for each, score in zip(judged, scores, strict=True)
        ]
        tokens: dict[ResponseKey, list[int]] = {
            (each.prompt_id, each.item.response): each.item.token_ids for each in judged
        }
        columns = {"prompt_id": [key[0] for key in tokens], "response": [key[1] for key in tokens]}
        query_set = BlockTable(storage.join(self.now.run.url, "labels", job.key, "query_set"), 1)
        query_set.write(0, pa.table(columns | {"token_ids": list(tokens.values())}))
        table = BlockTable(storage.join(self.now.run.url, "labels", job.key, "judgements"), 1)
        table.write(0, to_table(records, Judgement))
        return Judgements(key=job.key, table=table, query_set=QuerySet(key=job.key, table=query_set))
