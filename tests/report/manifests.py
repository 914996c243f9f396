"""Pieces that made-up run directories share."""

import json
from pathlib import Path
from typing import Any


def estimate(mean: float, standard_error: float | None, num: int = 64) -> dict[str, Any]:
    return {"mean": mean, "standard_error": standard_error, "num": num}


def write_manifest(run_dir: Path, stage: str, metrics: dict[str, Any], *, seconds: float = 1.0) -> None:
    folder = run_dir / "stages" / stage
    folder.mkdir(parents=True, exist_ok=True)
    manifest = {"stage": stage, "key": "k", "seconds": seconds, "num_rows": 10, "metrics": metrics}
    summary = {"summary": f"{stage} made {len(metrics)} numbers", "finished_at": "2025-01-01T00:00:00+00:00"}
    (folder / "manifest.json").write_text(json.dumps(manifest | summary))


def edit_metrics(run_dir: Path, stage: str, **changes: Any) -> None:
    """Replace some metrics of a finished stage."""
    path = run_dir / "stages" / stage / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["metrics"] |= changes
    path.write_text(json.dumps(manifest))
