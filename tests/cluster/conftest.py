"""A cluster of three nodes for the tests of faults; for root, with a network of its own to each worker node."""

import contextlib
import os

import pytest

from jobs.bench.hosts import Network
from jobs.bench.raylets import Raylets


@pytest.fixture(scope="session")
def cluster(tmp_path_factory):
    """A head without work and two workers; a test that loses one adds another."""
    with contextlib.ExitStack() as stack:
        network = stack.enter_context(Network()) if os.geteuid() == 0 else None
        folder = tmp_path_factory.mktemp("cluster")
        yield stack.enter_context(Raylets(folder, network=network))
