"""An object store too small for what streams through it spills to disk: slower, and nothing else."""

import json
import os
import subprocess
import sys
from pathlib import Path

from tests.data.tiny_store import NUM_BLOCKS, ROWS_PER_BLOCK, STORE_BYTES, TEXT_BYTES

ROOT = Path(__file__).parents[2]


def test_more_pairs_than_the_object_store_holds_arrive_once_in_every_epoch(tmp_path):
    assert NUM_BLOCKS * ROWS_PER_BLOCK * TEXT_BYTES > 2 * STORE_BYTES
    ran = subprocess.run(
        [sys.executable, "-m", "tests.data.tiny_store", str(tmp_path)],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT), "RAY_ADDRESS": "local"},
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert ran.returncode == 0, ran.stderr[-4000:]
    seen = json.loads(ran.stdout.splitlines()[-1])
    expected = sorted(f"pair-{n}" for n in range(NUM_BLOCKS * ROWS_PER_BLOCK))
    first, second = seen["epochs"]
    assert sorted(name for name, _ in first) == sorted(name for name, _ in second) == expected
    assert all(whole for _, whole in first + second)
    assert seen["others_intact"]
    assert seen["spilled_mib"] > 0, "the store was large enough: this test shows nothing"
