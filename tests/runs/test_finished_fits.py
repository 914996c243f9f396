"""Checkpoints of a training: there until its stage is finished, and no longer."""

from rayrl.runs import storage
from rayrl.runs.stage_metrics import SftMetrics
from rayrl.runs.stage_table import SFT
from tests.report.made_up_runs import FITTED
from tests.runs.test_run import config_of, open_run


def test_a_finished_stage_gives_the_checkpoints_of_its_fits_back(tmp_path):
    run = open_run(config_of(tmp_path))
    metrics = SftMetrics(num_steps=60, **FITTED, num_empty=0, num_below_score=0, num_truncated=2)
    key = run.key(SFT, "this work")
    assert run.finished(SFT, key) is None
    for folder in ("fit/mine-sft/checkpoint_00000060_x", "checkpoint"):
        storage.write_bytes(run.folder(SFT, folder, "weights"), b"weights")
    # A process that dies before the manifest goes on from the checkpoint.
    assert run.finished(SFT, key) is None
    assert storage.exists(run.folder(SFT, "fit", "mine-sft"))
    run.finish(SFT, key, since=0.0, num_rows=1, metrics=metrics, summary="done")
    assert not storage.exists(run.folder(SFT, "fit"))
    assert storage.exists(run.folder(SFT, "checkpoint", "weights"))
    # One that died between the manifest and the removal has left them.
    storage.write_bytes(run.folder(SFT, "fit", "weights"), b"weights")
    assert run.finished(SFT, key) is not None
    assert not storage.exists(run.folder(SFT, "fit"))
