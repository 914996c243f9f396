"""The quickstart notebook runs on a finished run, and is kept without outputs."""

import contextlib
from pathlib import Path

import nbclient
import nbformat
import pytest

from rayrl.oracles.ledger import Ledger, Query
from rayrl.oracles.protocol import Verdict

NOTEBOOK = Path(__file__).parents[2] / "notebooks" / "quickstart.ipynb"


@pytest.fixture
def execute(monkeypatch):
    """Runs the notebook on a run directory; returns what its cells showed."""

    def run(run_dir):
        monkeypatch.setenv("RAYRL_RUN", str(run_dir))
        monkeypatch.setenv("PYTHONPATH", str(NOTEBOOK.parents[1]))
        notebook = nbformat.read(NOTEBOOK, as_version=4)
        resources = {"metadata": {"path": str(NOTEBOOK.parent)}}
        nbclient.NotebookClient(notebook, timeout=120, kernel_name="python3", resources=resources).execute()
        return [output["data"] for cell in notebook.cells for output in cell.get("outputs", []) if "data" in output]

    return run


def test_it_shows_the_ledger_the_points_and_the_plots(run_dir, execute):
    with contextlib.closing(Ledger(str(run_dir / "ledger.sqlite"), {"label": 4})) as ledger:
        query = Query(prompt_id="p", response_id="p-0", prompt="x", response="y", oracle="o", rubric="r")
        ledger.commit(ledger.reserve(query, "label"), Verdict(score=4.5, rationale="good"))
    shown = execute(run_dir)
    assert len([data for data in shown if "image/svg+xml" in data]) == 6
    texts = "".join(data.get("text/html", "") + data.get("text/markdown", "") for data in shown)
    for expected in ("scored", "4.5", "+0.45 \u00b1 0.11", "0.61 \u00b1 0.14", "timed out"):
        assert expected in texts
    assert "<script>" not in texts


def test_it_runs_on_a_run_that_has_not_begun(tmp_path, execute):
    (tmp_path / "config.json").write_text('{"name": "young", "select": {"budget": 8}}')
    shown = execute(tmp_path)
    assert not [data for data in shown if "image/svg+xml" in data]


def test_it_is_kept_without_outputs():
    cells = [cell for cell in nbformat.read(NOTEBOOK, as_version=4).cells if cell.cell_type == "code"]
    assert all(not cell.outputs and cell.execution_count is None for cell in cells)
