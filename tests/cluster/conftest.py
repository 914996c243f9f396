"""Clusters of three nodes; for root, each worker node has a network of its own."""

import os

import pytest

from jobs.bench.hosts import Network
from jobs.bench.raylets import Raylets


@pytest.fixture(scope="session")
def network():
    """Where nodes have hosts of their own, or nothing for who is not root."""
    if os.geteuid() != 0:
        yield None
    else:
        with Network() as network:
            yield network


@pytest.fixture(scope="session")
def cluster(network, tmp_path_factory):
    """A head without work and two workers; a test that loses one adds another."""
    with Raylets(tmp_path_factory.mktemp("cluster"), network=network) as cluster:
        yield cluster
