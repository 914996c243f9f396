"""Folders of a fit's checkpoints: one for each layout of ranks and optimizer, and no others left behind."""

from rayrl.config import SftConfig
from rayrl.runs import storage
from rayrl.runs.stage_table import DPO
from rayrl.stages.fitting import fit_folder, remove_other_fits
from tests.runs.test_run import config_of, open_run


def test_a_layout_that_cannot_go_on_from_another_has_a_folder_of_its_own():
    layouts = [{}, {"num_workers": 2}, {"zero_stage": 2}, {"zero_stage": 2, "cpu_offload": True}]
    names = [fit_folder(SftConfig(**layout)) for layout in layouts]
    assert len(set(names)) == len(layouts)
    assert names[0] == "fit-1x-zero0"
    assert fit_folder(SftConfig(micro_batch_tokens=64, checkpoint_every=3)) == names[0]


def test_half_a_fit_of_another_layout_is_removed(tmp_path):
    run = open_run(config_of(tmp_path))
    for folder in ("fit-1x-zero0", "fit-2x-zero2", "fit-1x-zero2-offload", "checkpoint"):
        storage.write_bytes(run.folder(DPO, folder, "fit", "checkpoint_1", "weights"), b"weights")
    remove_other_fits(run, DPO, "fit-1x-zero0")
    assert storage.children(run.folder(DPO)) == ["checkpoint", "fit-1x-zero0"]
