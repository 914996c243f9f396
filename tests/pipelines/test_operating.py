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

from rayrl.cli import main
from rayrl.pipelines.job import STOPPED

ROOT = Path(__file__).parents[2]
COMMAND = [sys.executable, "jobs/proxy_dpo.py", "jobs/configs/quickstart.toml", "name=operated", "sft.enabled=false"]


def operate(capsys, *arguments):
    """What a command of `rayrl` prints, by lines."""
    with pytest.raises(SystemExit) as ended:
        main([*arguments])
    assert ended.value.code == 0
    return capsys.readouterr().out.splitlines()


def until(condition, job, seconds=300):
    deadline = time.monotonic() + seconds
    while not condition():
        assert job.poll() is None and time.monotonic() < deadline, job.stderr.read() if job.poll() is not None else ""
        time.sleep(0.2)


@pytest.mark.slow
def test_a_run_is_scaled_and_stopped_from_outside(ray_cluster, tmp_path, capsys):
    folder = tmp_path / "run"
    environment = os.environ | {"RAY_ADDRESS": ray.get_runtime_context().gcs_address, "HF_HUB_OFFLINE": "1"}
    command = [*COMMAND, f"run_dir={folder}"]
    job = subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL)
    try:
        until(lambda: list((folder / "stages" / "generate" / "table").glob("part-*")), job)
        rows = {row.split()[0]: row.split()[1:] for row in operate(capsys, "scale", str(folder), "generators=2")[1:]}
        assert rows["operated-generators"][-1] == "2" and "oracle" in rows
        until(lambda: operate(capsys, "scale", "operated")[1:] and num_generators() == 2, job)
        assert operate(capsys, "stop", "operated") == ["operated has ended; the command that started it continues it"]
        assert job.wait(timeout=60) == STOPPED
        assert job.stderr.read().decode().splitlines()[-1] == "stopped; the same command continues the run"
    finally:
        job.kill()
        job.wait()
    assert [name for name in list_named_actors() if name.startswith("operated-")] == []
    subprocess.run(command, cwd=ROOT, env=environment, check=True, timeout=400, capture_output=True)
    assert json.loads((folder / "stages" / "evaluate" / "manifest.json").read_text())


def num_generators():
    return sum(name.startswith("operated-generators-") and name[-1].isdigit() for name in list_named_actors())
