"""The benches of scale at tiny sizes: they run, and count what they should."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def rows(bench, *arguments):
    """The cells of the table that a bench prints, without its head."""
    done = subprocess.run(
        [sys.executable, f"jobs/bench/{bench}.py", *arguments], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    lines = [line.strip("|").split("|") for line in done.stdout.splitlines() if line.startswith("|")]
    return [[float(cell) for cell in line] for line in lines[2:]]


@pytest.mark.slow
def test_throughput_is_measured_at_every_size():
    found = rows("replicas", "--sizes", "1", "2", "--requests-per-replica", "64", "--request-s", "0.01")
    assert [row[0] for row in found] == [1, 2]
    assert all(0 < row[2] <= 3200 * row[0] for row in found)


@pytest.mark.slow
def test_every_prompt_becomes_a_pair():
    (row,) = rows("scale", "--sizes", "2000", "--budget", "50")
    prompts, *seconds = row[:7]
    num_pairs = row[8]
    assert prompts == 2000 and all(s > 0 for s in seconds)
    assert 1990 <= num_pairs <= 2000, "but for prompts whose responses are alike, or tie"
