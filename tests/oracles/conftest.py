"""Judge server and ledger's place that most tests of oracles start from."""

import pytest

from tests.judge_server import JudgeServer


@pytest.fixture
def server():
    with JudgeServer() as server:
        yield server


@pytest.fixture
def location(tmp_path):
    return str(tmp_path / "ledger.sqlite")
