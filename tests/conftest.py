"""Fixtures for the whole suite: one Ray cluster, one tiny policy, one engine of each kind."""

import os
from dataclasses import dataclass
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("RAY_TRAIN_ENABLE_PRINT_PATCH", "0")

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="session")
def ray_cluster():
    """One small Ray cluster for all tests that need one."""
    import ray

    ray.init("local", num_cpus=4, include_dashboard=False, log_to_driver=False, namespace="rayrl")
    yield
    ray.shutdown()


@dataclass(frozen=True)
class TinyPolicy:
    """The quickstart's model."""

    path: str

    @property
    def checkpoint(self):
        from rayrl.records import Checkpoint

        return Checkpoint(path=self.path, version="tiny")

    def load(self):
        import torch

        from rayrl.models.policy import load_policy

        return load_policy(self.checkpoint, torch.float32).eval()


@pytest.fixture(scope="session")
def tiny_policy():
    return TinyPolicy(str(ROOT / "jobs" / "quickstart" / "model"))


def _fleet(name, engine, policy, pooling):
    from rayrl.config import EngineConfig
    from rayrl.engines.vllm_engine import EngineSpec
    from rayrl.fleets.fleet import start_fleet

    spec = EngineSpec(
        checkpoint=policy.checkpoint,
        config=EngineConfig(),
        dtype="float32",
        max_model_len=None,
        trust_remote_code=False,
        on_gpu=False,
        pooling=pooling,
    )
    return start_fleet(name, engine, spec)


@pytest.fixture(scope="session")
def generators(ray_cluster, tiny_policy):
    """A fleet of one generation replica."""
    from rayrl.engines.generator import Generator

    fleet = _fleet("test-generators", Generator, tiny_policy, None)
    fleet.wait_ready()
    yield fleet
    fleet.stop()


@pytest.fixture(scope="session")
def embedders(ray_cluster, tiny_policy):
    """A fleet of one embedding replica (mean pooling)."""
    from rayrl.engines.embedder import Embedder

    fleet = _fleet("test-embedders", Embedder, tiny_policy, "mean")
    fleet.wait_ready()
    yield fleet
    fleet.stop()


@pytest.fixture(scope="session")
def last_embedders(ray_cluster, tiny_policy):
    """A fleet of one embedding replica (the last token's vector)."""
    from rayrl.engines.embedder import Embedder

    fleet = _fleet("test-last-embedders", Embedder, tiny_policy, "last")
    fleet.wait_ready()
    yield fleet
    fleet.stop()
