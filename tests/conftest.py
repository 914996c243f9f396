"""Fixtures for the whole suite."""

import pytest


@pytest.fixture(scope="session")
def ray_cluster():
    """One small Ray cluster for all tests that need one."""
    import ray

    ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False, namespace="rayrl")
    yield
    ray.shutdown()
