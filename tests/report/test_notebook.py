"""The notebooks run on finished runs, and are kept without outputs."""

import contextlib
from pathlib import Path

import nbclient
import nbformat
import pytest

from rayrl.oracles.ledger import Ledger
from rayrl.oracles.protocol import Verdict
from tests.report.made_up_runs import PROXY_DPO, RLP, judgement, write_config

NOTEBOOKS = Path(__file__).parents[2] / "notebooks"
EVERY = pytest.mark.parametrize("name", ["quickstart", "rlp"])


@pytest.fixture
def execute(monkeypatch):
    """Runs a notebook on a run directory; returns what its cells showed."""

    def run(name, run_dir):
        monkeypatch.setenv("RAYRL_RUN", str(run_dir))
        monkeypatch.setenv("PYTHONPATH", str(NOTEBOOKS.parent))
        notebook = nbformat.read(NOTEBOOKS / f"{name}.ipynb", as_version=4)
        resources = {"metadata": {"path": str(NOTEBOOKS)}}
        nbclient.NotebookClient(notebook, timeout=120, kernel_name="python3", resources=resources).execute()
        return [output["data"] for cell in notebook.cells for output in cell.get("outputs", []) if "data" in output]

    return run


def num_figures(shown):
    return sum("image/svg+xml" in data for data in shown)


def texts_of(shown):
    return "".join(data.get("text/html", "") + data.get("text/markdown", "") for data in shown)


def test_it_shows_the_ledger_the_points_and_the_plots(run_dir, execute):
    with contextlib.closing(Ledger(str(run_dir / "ledger.sqlite"), {"label": 4})) as ledger:
        ledger.commit(ledger.reserve(judgement("y")), Verdict(score=4.5, rationale="good"))
    shown = execute("quickstart", run_dir)
    assert num_figures(shown) == 6
    texts = texts_of(shown)
    for expected in ("scored", "4.5", "+0.45 \u00b1 0.11", "0.61 \u00b1 0.14", "timed out"):
        assert expected in texts
    assert "<script>" not in texts


def test_it_shows_the_preferences_both_reward_models_and_the_policies(rlp_run_dir, execute):
    shown = execute("rlp", rlp_run_dir)
    assert num_figures(shown) == 6
    texts = texts_of(shown)
    for expected in (
        "<td>comparison</td>",
        "Twice, 0.",
        "<td>first</td>",  # the response that the oracle preferred
        "Tell a story about hare number 4.",
        "&lt;i&gt;Hare&lt;/i&gt;",
        "0.71 \u00b1 0.06",
        "0.74 \u00b1 0.06",
        "0.720 \u00b1 0.049",
        "low_confidence",
        "<td>402</td>",
        "0.80 \u00b1 0.08",  # the oracle on the pairs at gamma 0.5
        "at most 0.64",
        "+0.37 \u00b1 0.09",
        "RLP minus plain PPO: **+0.46 \u00b1 0.06**",
        "One seed",
        "Tell a story about fox number 7.",
    ):
        assert expected in texts
    assert "not run" not in texts


@EVERY
def test_it_runs_on_a_run_that_has_not_begun(name, tmp_path, execute):
    write_config(tmp_path, {"quickstart": PROXY_DPO, "rlp": RLP}[name])
    assert num_figures(execute(name, tmp_path)) == 0


@EVERY
def test_it_is_kept_without_outputs(name):
    notebook = nbformat.read(NOTEBOOKS / f"{name}.ipynb", as_version=4)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(not cell.outputs and cell.execution_count is None for cell in cells)
