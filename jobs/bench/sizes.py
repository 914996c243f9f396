"""Benchmarks over sizes: each size in a process of its own, with a Ray of its own, on a pool of made-up prompts."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from rayrl.config import RunConfig, load_config


def made_up(folder: str, num_prompts: int, changes: dict[str, Any]) -> RunConfig:
    """Load the quickstart's config for a pool of `num_prompts` prompts, none held out, with these settings changed."""
    prompts = Path(folder) / "prompts.jsonl"
    with prompts.open("w") as file:
        for i in range(num_prompts):
            file.write(json.dumps({"prompt": f"How do I answer question number {i}?"}) + "\n")
    pool = {"run_dir": f"{folder}/run", "pool.path": str(prompts), "pool.limit": num_prompts, "pool.num_eval": 0}
    overrides = [f"{name}={toml(value)}" for name, value in (pool | changes).items()]
    return load_config("jobs/configs/quickstart.toml", overrides)


def toml(value: Any) -> str:
    """Write a setting as an override does."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{name}={toml(item)}" for name, item in value.items()) + "}"
    return json.dumps(value)


def measured(bench: str, size: int, *options: Any) -> dict[str, Any]:
    """Run `python BENCH --only SIZE ...`; return what it prints as JSON at its end."""
    command = [sys.executable, bench, "--only", size, *options]
    done = subprocess.run(list(map(str, command)), stdout=subprocess.PIPE, check=True)
    return json.loads(next(line for line in reversed(done.stdout.splitlines()) if line.startswith(b"{")))
