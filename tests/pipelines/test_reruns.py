"""A rerun of a finished run of the second pipeline: everything is found, and no engine, expert or model is needed."""

from types import SimpleNamespace

import pytest

from rayrl.config import RunConfig
from rayrl.pipelines.rlp import rlp
from rayrl.runs.run import Manifest, Run

NOBODY = SimpleNamespace(dtype="float32")
"""Services without a fleet: asking for one fails."""
FOUND = {
    "num_prompts": 8,
    "num_eval": 2,
    "num_responses": 16,
    "block_counts": [16],
    "num_blocks": 1,
    "train_blocks": 1,
    "held_out_blocks": 1,
    "means": [0.0],
    "stds": [1.0],
}


class Finished(Run):
    """A run whose every stage is done."""

    def finished(self, stage, key):
        return Manifest(stage=stage, key=key, seconds=0, num_rows=1, metrics=FOUND, summary="", finished_at="")

    def manifest(self, stage):
        return self.finished(stage, "found")


@pytest.mark.parametrize(
    "changes",
    [
        *({"refresh": {"method": m}} for m in ("spg", "uml", "reward_pairs", "self_judged", "ocrm", "none")),
        {"reward_model": {"num_members": 3}},
        {"rounds": 2},
        {"ppo": {"reward": "evaluator"}, "evaluator": {"type": "scalar"}},
        {"ppo": {"reward": "evaluator"}, "rounds": 2},
        {"ppo": {"reward": "function", "function": "tests.oracles.length_expert:reward"}},
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
    run = Finished(config=RunConfig.model_validate(tree | changes), url=str(tmp_path))
    assert rlp(run, NOBODY, None).stage == "evaluate"  # type: ignore[arg-type]
