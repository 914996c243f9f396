"""Clusters of three nodes; for root, each worker node has a network of its own."""

import os
from pathlib import Path

import pytest

from rayrl.fleets.local_cluster import LocalCluster
from rayrl.fleets.local_network import Network

ROOT = Path(__file__).parents[2]


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
    with LocalCluster(tmp_path_factory.mktemp("cluster"), network=network, working_dir=ROOT) as cluster:
        yield cluster
