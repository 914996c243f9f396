"""An operator at a run that goes on: looks at it, scales it, ends it, and the same command continues it."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import ray
from ray.util import list_named_actors

from rayrl.pipelines.stopping import STOPPED

ROOT = Path(__file__).parents[2]
COMMAND = [sys.executable, "jobs/proxy_dpo.py", "jobs/configs/quickstart.toml", "name=operated", "sft.enabled=false"]
COMMAND += ["pool.limit=60", "pool.num_eval=12", "generate.block_size=8", "select.budget=24", "evaluate.budget=24"]
COMMAND += ["evaluator.epochs=4", "dpo.epochs=1"]


def operate(*arguments):
    """What a command of `rayrl` in a process of its own prints, by lines."""
    command = [sys.executable, "-m", "rayrl.cli", *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def environment():
    return os.environ | {"RAY_ADDRESS": ray.get_runtime_context().gcs_address, "HF_HUB_OFFLINE": "1"}


def until(condition, job, seconds=300):
    deadline = time.monotonic() + seconds
    while not condition():
        assert job.poll() is None and time.monotonic() < deadline, "it never came to that"
        time.sleep(0.2)


@pytest.mark.slow
def test_a_run_is_scaled_and_stopped_from_outside(ray_cluster, tmp_path):
    folder = tmp_path / "run"
    command = [*COMMAND, f"run_dir={folder}"]
    with (tmp_path / "log").open("w") as log:
        job = subprocess.Popen(command, cwd=ROOT, env=environment(), stderr=log, stdout=log)
    try:
        until(lambda: list((folder / "stages" / "generate" / "table").glob("part-*")), job)
        rows = {row.split()[0]: row.split()[1:] for row in operate("scale", str(folder), "generators=2")[1:]}
        assert rows["operated-generators"][-1] == "2" and "oracle" in rows
        until(lambda: num_generators() == 2, job)
        seen = "\n".join(operate("status", str(folder), "--live"))
        assert "operated-generators" in seen and "generate" in seen
        assert operate("stop", "operated") == ["operated has ended; the command that started it continues it"]
        assert job.wait(timeout=60) == STOPPED
        assert "stopped; the same command continues the run" in (tmp_path / "log").read_text()
    finally:
        job.kill()
        job.wait()
    assert [name for name in list_named_actors() if name.startswith("operated-")] == []
    subprocess.run(command, cwd=ROOT, env=environment(), check=True, timeout=400, capture_output=True)
    assert json.loads((folder / "stages" / "evaluate" / "manifest.json").read_text())


def num_generators():
    return sum(name.startswith("operated-generators-") and name[-1].isdigit() for name in list_named_actors())
