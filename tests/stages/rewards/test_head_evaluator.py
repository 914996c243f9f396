"""Heads as the evaluator: fitted on what the selection embeds, written, read back and served."""

import numpy as np
import pytest

from rayrl.config import load_config
from rayrl.data.blocks import BlockTable
from rayrl.preflight import check
from rayrl.records import Judgement, Scored, to_table
from rayrl.runs.run import Run, read_manifest
from rayrl.runs.stage_table import FIT_EVALUATOR
from rayrl.stages.artifacts import Judgements, QueryRow, QuerySet
from rayrl.stages.proxy.fit_evaluator import fit_evaluator
from rayrl.stages.rewards.evaluators import evaluator_of
from rayrl.stages.rewards.head_evaluator import HeadEvaluator, vectors_of
from rayrl.stages.selection.select import QUERY_SCHEMA
from tests.fakes import OnlyEmbedders

QUICKSTART = "jobs/configs/quickstart.toml"


def item(number):
    tokens = [1, 20 + number % 7, 30 + 13 * number % 60, 5 + number % 11]
    return Scored(prompt=f"question {number // 2}", response=f"answer {number}", token_ids=tokens)


@pytest.fixture
def judged(tmp_path):
    """Forty judgements whose scores follow one token of the response."""
    items = [item(number) for number in range(40)]
    judgements = [
        Judgement(
            prompt_id=f"p{number // 2}",
            response_id=str(number),
            prompt=one.prompt,
            response=one.response,
            score=float(number % 7),
            status="scored",
        )
        for number, one in enumerate(items)
    ]
    table, asked = (BlockTable(str(tmp_path / name), 1) for name in ("judgements", "asked"))
    table.write(0, to_table(judgements, Judgement))
    rows = [
        QueryRow(
            ordinal=number,
            prompt_id=j.prompt_id,
            response_id=j.response_id,
            prompt=j.prompt,
            response=j.response,
            token_ids=one.token_ids,
        )
        for number, (j, one) in enumerate(zip(judgements, items, strict=True))
    ]
    import pyarrow as pa

    asked.write(0, pa.Table.from_pylist(rows, schema=QUERY_SCHEMA))
    return Judgements(key="e", table=table, query_set=QuerySet(key="q", table=asked))


def test_it_learns_the_paid_scores_without_training_a_model(embedders, tiny_policy, judged, tmp_path):
    config = load_config(QUICKSTART, ["evaluator.type=head", f"run_dir={tmp_path}/run"])
    run, services, m1 = Run(config=config, url=config.run_dir), OnlyEmbedders(embedders), tiny_policy.checkpoint
    evaluator = fit_evaluator(run, services, m1, [judged])
    assert isinstance(evaluator, HeadEvaluator)
    metrics = read_manifest(config.run_dir, FIT_EVALUATOR).metrics
    assert metrics.final_loss < 0.8 * metrics.first_loss and metrics.validation.num == 6
    # Read back by another process, it scores alike.
    again = evaluator_of(run, evaluator.checkpoint, m1).serve(services)
    items = [item(number) for number in range(100, 120)]
    scores = again.score(items)
    assert scores == evaluator.serve(services).score(items) and again.score([]) == []
    vectors = vectors_of(again.embedding, items)
    assert np.allclose(scores, again.heads.scores(vectors).mean(1), atol=1e-5)
    # A finished stage is not fitted again.
    assert fit_evaluator(run, None, m1, [judged]).checkpoint == evaluator.checkpoint


def test_the_plan_of_heads_has_no_training(tmp_path):
    rows = {}
    for kind in ("head", "scalar"):
        config = load_config(QUICKSTART, [f"evaluator.type={kind}", f"run_dir={tmp_path}/{kind}"])
        rows[kind] = {row.name: row for row in check(config).stages}["fit_evaluator"]
    assert rows["head"].what == "head evaluator on the paid judgements"
    assert "worker" in str(rows["scalar"]) and "worker" not in str(rows["head"])
