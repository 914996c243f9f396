"""What is said, and refused, before a stage asks: answers to other questions stay paid, and half a set is not asked."""

import pytest
import ray

from rayrl.config import ScriptedOracleConfig
from rayrl.errors import RunDirectoryError
from rayrl.models.judge_prompt import Rubric
from rayrl.oracles.pool import OraclePool
from rayrl.records import Judgement
from rayrl.runs.stage_table import EVALUATE, QUERY
from rayrl.stages.labelling.ask import ask

ORACLE = ScriptedOracleConfig(type="scripted", function="tests.oracles.length_oracle:judge")
EARLIER = Rubric(template="{prompt} {response}", min_score=0, max_score=5)
MENDED = Rubric(template="Mended: {prompt} {response}", min_score=0, max_score=5)


def questions(num):
    return [Judgement(prompt_id=f"p{n}", response_id=f"r{n}", prompt=f"p {n}", response="a b c") for n in range(num)]


def asked(location, rubric, stage, num, budget):
    """Answers of a pool with this judge prompt, and what its ledger has spent."""
    budgets = {"label": budget, "evaluate": budget}
    pool = ray.remote(OraclePool).options(num_cpus=0).remote(ORACLE, rubric, location, budgets, "run")
    try:
        return ask(pool, questions(num), stage, describe="asking")
    finally:
        ray.get(pool.close.remote())
        ray.kill(pool)


@pytest.mark.parametrize("stage", [QUERY, EVALUATE], ids=lambda stage: stage.name)
def test_a_mended_judge_prompt_is_another_question_and_is_said_before_it_is_asked(ray_cluster, tmp_path, stage, caplog):
    location = str(tmp_path / "ledger.sqlite")
    asked(location, EARLIER, stage, 4, budget=8)
    again = asked(location, EARLIER, stage, 4, budget=8)
    assert all(answer.status == "scored" for answer in again) and not caplog.records
    mended = asked(location, MENDED, stage, 4, budget=8)
    assert all(answer.status == "scored" for answer in mended)
    (said,) = [record.message for record in caplog.records if "earlier judge prompt" in record.message]
    assert "4 answers" in said and "stay in the ledger; 4 questions will be asked, 0 are answered already" in said


@pytest.mark.parametrize("stage", [QUERY, EVALUATE], ids=lambda stage: stage.name)
def test_a_mended_judge_prompt_whose_questions_the_budget_does_not_pay_for_is_refused(ray_cluster, tmp_path, stage):
    location = str(tmp_path / "ledger.sqlite")
    asked(location, EARLIER, stage, 4, budget=6)
    with pytest.raises(RunDirectoryError, match=r"4 questions would be asked, and its budget has 2 left. Nothing was"):
        asked(location, MENDED, stage, 4, budget=6)
    assert all(answer.status == "scored" for answer in asked(location, EARLIER, stage, 4, budget=6))
