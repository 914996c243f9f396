"""Finished runs of both pipelines, made up."""

from pathlib import Path

import pytest

from tests.report.made_up_runs import write_proxy_dpo_run, write_rlp_run


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """A finished run directory of proxy DPO."""
    return write_proxy_dpo_run(tmp_path / "made-up")


@pytest.fixture
def rlp_run_dir(tmp_path: Path) -> Path:
    """A finished run directory of the second pipeline."""
    return write_rlp_run(tmp_path / "made-up-rlp")
