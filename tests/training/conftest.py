"""Fixture of trainings inside of the tests' own process."""

import pytest
import torch.distributed as dist


@pytest.fixture(scope="session")
def process_group(tmp_path_factory):
    """A process group of this process alone. One for all tests: DeepSpeed keeps the first that it meets."""
    folder = tmp_path_factory.mktemp("rendezvous")
    dist.init_process_group("gloo", init_method=f"file://{folder}/file", rank=0, world_size=1)
    yield
    dist.destroy_process_group()
