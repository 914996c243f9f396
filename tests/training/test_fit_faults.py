"""Real fits on disks that fill up or change what was written to them."""

import json
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from rayrl.errors import DiskFull
from rayrl.fleets.local_cluster import LocalCluster, wait_until
from rayrl.training import checkpoints
from tests.s3_server import new_bucket, s3_server
from tests.training.faulty_disks import NUM_STEPS, FullDisk, sft_fit, write_examples

ROOT = Path(__file__).parents[2]
ALL_STEPS = list(range(1, NUM_STEPS + 1))


def run(*command, **variables):
    """A program with a Ray of its own, to its end."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "RAY_ADDRESS": "local"} | variables
    ran = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=400)
    assert ran.returncode == 0, ran.stderr[-4000:]
    return ran


def steps_logged(folder):
    return [json.loads(line)["step"] for line in (Path(folder) / "metrics" / "sft.jsonl").read_text().splitlines()]


def weights(folder):
    return load_file(Path(folder) / "checkpoint" / "model.safetensors")


def assert_same_weights(ours, theirs):
    for name, weight in ours.items():
        torch.testing.assert_close(weight, theirs[name], atol=1e-4, rtol=1e-4)


@pytest.fixture(scope="module")
def undisturbed(ray_cluster, tmp_path_factory):
    """A fit that nothing happened to, and its rows."""
    folder = tmp_path_factory.mktemp("undisturbed")
    table = write_examples(folder / "examples")
    sft_fit(folder, table)
    return folder, table


def test_a_damaged_last_checkpoint_is_passed_over_and_told(undisturbed, caplog):
    folder, table = undisturbed
    before = weights(folder)
    last, earlier = checkpoints.whole(f"{folder}/fit/fit")[:2]
    assert last.startswith("checkpoint_00000007") and earlier.startswith("checkpoint_00000006")
    file = max((folder / "fit" / "fit" / last).rglob("*.pt"), key=lambda path: path.stat().st_size)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 0xFF  # one byte: torch would load it without a word
    file.write_bytes(content)
    sft_fit(folder, table)
    assert steps_logged(folder) == [*ALL_STEPS, 7], "from step 6 on"
    assert re.search(rf"{last} is damaged \(.*{file.name}\); the fit went on from the checkpoint before", caplog.text)
    assert_same_weights(weights(folder), before)
    left = checkpoints.whole(f"{folder}/fit/fit")
    assert last not in left and left[0].startswith("checkpoint_00000007")


def test_a_checkpoint_that_cannot_be_written_is_refused_and_the_earlier_one_goes_on(undisturbed, tmp_path):
    """A real EFBIG of the kernel in the training worker, as a quota gives, where torch writes the files.

    It goes on with other settings, as after a lack of memory, and with its state over two ranks: the training is the
    same one.
    """
    folder, table = undisturbed
    with pytest.raises(DiskFull, match=r"the checkpoint of step 4: the disk of \S+ .* [\d,]+ bytes free"):
        sft_fit(tmp_path, table, FullDisk(limit_bytes=200_000))
    assert [name[:19] for name in checkpoints.whole(f"{tmp_path}/fit/fit")] == ["checkpoint_00000002"]
    layout = {"num_workers": 2, "zero_stage": 2, "cpu_offload": True}
    sft_fit(tmp_path, table, micro_batch_tokens=24, gradient_checkpointing=True, checkpoint_every=1, **layout)
    steps = steps_logged(tmp_path)  # training may have gone on while the checkpoint of step 4 was written
    assert steps[:4] == [1, 2, 3, 4] and steps[-5:] == [3, 4, 5, 6, 7] and len(steps) <= 7 + 5, "from step 2 on"
    assert_same_weights(weights(tmp_path), weights(folder))


@pytest.mark.slow
def test_a_disk_full_in_mid_checkpoint_keeps_the_earlier_one_and_leaves_no_half(tmp_path):
    """A real ENOSPC: a disk of 64 MB of the test's own, in a namespace that needs no rights."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = f"mount -t tmpfs -o size=64m tmpfs {disk}"
    if subprocess.run(["unshare", "-Urm", "sh", "-c", mount], capture_output=True).returncode != 0:
        pytest.skip("this system lets nobody mount a disk in a namespace of their own")
    program = f"{mount} && exec {sys.executable} -m tests.training.faulty_disks {disk}"
    ran = run("unshare", "-Urm", "sh", "-c", program)
    # Who meets the full disk first says so: the worker that saves, or Ray Train's controller that lists what is saved.
    said = r"refused: (?:the checkpoint of step 4: )?the disk of (\S+) .* has ([\d,]+) bytes free"
    refused = re.search(said, ran.stdout)
    assert refused and refused[1] == f"{disk}/fit/fit", ran.stdout
    kept = re.search(r"kept: \['(checkpoint_00000002\w+)'\]", ran.stdout)
    assert kept and f"there: ['{kept[1]}']" in ran.stdout, "the half of step 4 takes no room"
    assert "finished" in ran.stdout


@pytest.mark.slow
def test_the_parts_of_two_nodes_meet_in_a_bucket_and_the_last_damaged_one_is_passed_over(monkeypatch):
    with s3_server() as environment:
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        monkeypatch.delenv("RAY_ADDRESS", raising=False)
        ran = run(sys.executable, "-m", "tests.training.two_nodes", f"{new_bucket()}/run")
    seen = json.loads(ran.stdout.splitlines()[-1])
    last, _ = seen["names"]
    assert {"rank-0-of-2.json", "rank-1-of-2.json"} <= set(seen["files"])
    assert len([name for name in seen["files"] if name.startswith("part-")]) == 2
    assert seen["logged"] == [*seen["steps"], seen["steps"][-1]], "one step again, from the checkpoint before"
    assert f"{last} is damaged" in ran.stderr


@pytest.mark.slow
def test_another_cluster_that_starts_on_the_machine_does_not_end_a_fit(tmp_path):
    """Whoever asks that one whether this fit's controller lives, hears that there is none."""
    command = [sys.executable, "-m", "tests.training.beside_another", str(tmp_path)]
    with tempfile.TemporaryDirectory(prefix="rayrl-") as temporary, ThreadPoolExecutor(1) as background:
        ran = background.submit(run, *command, RAY_ADDRESS="", RAY_TMPDIR=temporary)
        wait_until((tmp_path / "metrics" / "sft.jsonl").exists, 120, "the first step")
        with LocalCluster(tmp_path, num_workers=0, working_dir=ROOT) as other:
            (Path(temporary) / "ray" / "ray_current_cluster").write_text(other.address)
            (tmp_path / "go").touch()
            ran.result()
    assert steps_logged(tmp_path) == ALL_STEPS
