"""A rerun of a finished run of the second pipeline: everything is found, and no engine, oracle or model is needed."""

from types import SimpleNamespace

import pytest

from rayrl.config import RunConfig
from rayrl.pipelines.rlp import rlp
from tests.fakes import FinishedRun

NOBODY = SimpleNamespace(dtype="float32")
"""Services without a fleet: asking for one fails."""


@pytest.mark.parametrize(
    "changes",
    [
        *({"refresh": {"method": m}} for m in ("spg", "uml", "reward_pairs", "self_judged", "ocrm", "none")),
        {"reward_model": {"num_members": 3}},
        {"rounds": 2},
        {"ppo": {"reward": "evaluator"}, "evaluator": {"type": "scalar"}},
        {"ppo": {"reward": "evaluator"}, "rounds": 2},
        {"ppo": {"reward": "function", "function": "tests.oracles.length_oracle:reward"}},
    ],
    ids=str,
)
def test_a_rerun_of_a_finished_run_starts_no_engine(tmp_path, changes):
    tree = {
        "name": "t",
        "run_dir": str(tmp_path),
        "pipeline": "rlp",
        "policy": {"path": "model"},
        "pool": {"path": "pool.jsonl"},
        "seed_data": {"path": "seed.jsonl"},
        "select": {"budget": 8},
        "oracle": {"type": "scripted", "function": "a:b", "compare_function": "a:c"},
        "preferences": {"source": "oracle"},
        "evaluate": {"diagnosis_budget": 100, "best_of_n": 4},
    }
    run = FinishedRun(config=RunConfig.model_validate(tree | changes), url=str(tmp_path))
    assert rlp(run, NOBODY, None).stage == "evaluate"  # type: ignore[arg-type]
