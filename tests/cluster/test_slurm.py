"""The Slurm script, run for real with stand-ins for srun, scontrol and Ray that write down what they were asked."""

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "cluster" / "slurm.sh"
STAND_INS = {
    # a step lives until it is told to end; ENDS names a node whose step ends at once
    "srun": """
        echo "srun $* auth=$RAY_AUTH_MODE token=$(stat -c %a "$RAY_AUTH_TOKEN_PATH"):$(wc -c <"$RAY_AUTH_TOKEN_PATH")" \
          >>"$LOG"
        case "$*" in *"${ENDS:-none}"*) exit 1 ;; esac
        echo $$ >>"$STEPS"
        trap 'echo "step ended" >>"$LOG"; exit 0' TERM
        for _ in $(seq 1200); do sleep 0.05; done
    """,
    "scontrol": "printf 'node1\\nnode2\\nnode3\\n'",
    "getent": "echo '10.0.0.1 STREAM node1'",
    # "-" is the question how many nodes are there; anything else is the job
    "python": """
        if [ "$1" = - ]; then cat >/dev/null; echo "asked" >>"$LOG"; wc -l <"$STEPS" | sed "s/2/${JOINED:-3}/"; exit; fi
        echo "job $* at $RAY_ADDRESS" >>"$LOG"
        trap 'echo "job ended" >>"$LOG"; exit 143' TERM
        for _ in $(seq "${JOB_TICKS:-1}"); do sleep 0.05; done
        exit "${JOB_EXIT:-0}"
    """,
    "ray": "exit 99",
}


@pytest.fixture
def sbatch(tmp_path):
    """Start the script as Slurm would on node1 of three; the process, and what was written down."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name, body in STAND_INS.items():
        (folder / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
        (folder / name).chmod(0o755)
    log, home = tmp_path / "log", tmp_path / "home"
    home.mkdir()
    (tmp_path / "steps").touch()
    environment = {
        "PATH": f"{folder}:{os.environ['PATH']}",
        "HOME": str(home),
        "LOG": str(log),
        "STEPS": str(tmp_path / "steps"),
        "RAYRL_BIN": str(folder),
        "RAYRL_POLL_S": "0.1",
        "RAYRL_GRACE_S": "2",
        "SLURM_JOB_ID": "7",
        "SLURM_JOB_NUM_NODES": "3",
        "SLURM_JOB_NODELIST": "node[1-3]",
        "SLURM_CPUS_ON_NODE": "64",
    }

    def start(*arguments, **variables):
        process = subprocess.Popen(
            ["bash", str(SCRIPT), *arguments],
            env=environment | variables,
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        return process, log

    yield start
    left = [int(pid) for pid in (tmp_path / "steps").read_text().split() if Path(f"/proc/{pid}").exists()]
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    assert not left, f"steps still ran: {left}"
    assert list(home.iterdir()) == [], "the token is still there"


def finished(process, timeout=30):
    out, err = process.communicate(timeout=timeout)
    return process.returncode, out + err


JOB = ("jobs/proxy_dpo.py", "jobs/configs/quickstart.toml", "run_dir=/shared/run")


def test_the_script_is_bash():
    subprocess.run(["bash", "-n", str(SCRIPT)], check=True)
    assert os.access(SCRIPT, os.X_OK)
    header = SCRIPT.read_text().split("set -euo pipefail")[0]
    assert "#SBATCH --ntasks-per-node=1" in header and "#SBATCH --signal=B:TERM@" in header


def test_head_then_workers_then_the_job_and_everything_ends(sbatch):
    process, log = sbatch(*JOB)
    assert finished(process) == (0, "")
    lines = [line for line in log.read_text().splitlines() if line != "asked"]
    head, workers, job, *ends = lines
    assert "--nodelist=node1 " in head and " --head " in head and "--node-ip-address=10.0.0.1 --port=6379" in head
    assert "--dashboard-host=127.0.0.1" in head
    assert "--nodes=2 --ntasks=2 " in workers and "--nodelist=node2,node3 " in workers
    assert "--address=10.0.0.1:6379" in workers
    for step in (head, workers):
        assert "start --block" in step and "--cpus-per-task=64" in step and "--num-cpus=64" in step
        assert step.endswith("auth=token token=600:64")
    assert job == f"job {' '.join(JOB)} at 10.0.0.1:6379"
    assert ends == ["step ended", "step ended"]


def test_the_jobs_exit_code_is_the_scripts(sbatch):
    process, _ = sbatch(*JOB, JOB_EXIT="2")
    assert finished(process)[0] == 2


def test_nodes_that_do_not_join_end_the_job_at_the_deadline(sbatch):
    process, log = sbatch(*JOB, JOINED="2", RAYRL_DEADLINE_S="5")
    code, said = finished(process)
    assert code == 1 and "waited 5 s for 3 Ray nodes at 10.0.0.1:6379, 2 are there" in said
    assert "job " not in log.read_text()


def test_a_head_that_ends_is_not_waited_for(sbatch):
    process, log = sbatch(*JOB, ENDS="--nodelist=node1")
    code, said = finished(process)
    assert code == 1 and "the head's step on node1 has ended" in said
    assert "job " not in log.read_text()


def test_slurms_warning_ends_everything(sbatch):
    process, log = sbatch(*JOB, JOB_TICKS="1000")
    deadline = time.monotonic() + 20
    while not (log.exists() and "job " in log.read_text()):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.terminate()
    code, said = finished(process)
    assert code == 143 and "the same command continues the run" in said
    assert sorted(log.read_text().splitlines()[-3:]) == ["job ended", "step ended", "step ended"]


def test_without_a_job_it_says_how(sbatch):
    process, log = sbatch()
    code, said = finished(process)
    assert code == 2 and said.startswith("usage: sbatch") and not log.exists()
