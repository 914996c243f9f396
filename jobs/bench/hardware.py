"""Machine and date of a benchmark: the line above every table."""

import os
from datetime import UTC, datetime
from pathlib import Path


def hardware() -> str:
    """Describe CPU model, usable cores, load and date in one line."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown CPU")
    cores = len(os.sched_getaffinity(0))
    return f"{model}, {cores} cores, load {os.getloadavg()[0]:.1f} before the start, {datetime.now(UTC):%Y-%m-%d}"
