"""Health checks and swaps of an engine's replica, whose vLLM core is the test's."""

import asyncio
import threading
import time

import pytest
import ray
from ray.exceptions import RayActorError

from rayrl.engines import vllm_engine as engine
from rayrl.engines.vllm_engine import ServedEngine
from rayrl.errors import StageTimeout, WeightSyncError
from rayrl.metrics import prometheus
from rayrl.records import Checkpoint


class Core:
    """Answers once it may."""

    def __init__(self):
        self.goes_on = asyncio.Event()

    async def check_health(self):
        pass

    async def is_sleeping(self):
        await self.goes_on.wait()


class Replica(ServedEngine):
    """A replica on such a core."""

    def __init__(self):
        self.engine = Core()
        self.version, self.start_s, self.started_at, self.swaps_s = "v", 0.0, 0.0, []
        self._num_received, self._is_core_busy, self._swap_lock = 0, False, asyncio.Lock()
        self.text_difference = None


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(engine, "CORE_TIMEOUT_S", 0.05)


def test_a_core_that_does_not_answer_is_told():
    async def scenario():
        replica = Replica()
        with pytest.raises(StageTimeout, match="the engine's core has not answered"):
            await replica.status()
        replica.engine.goes_on.set()
        assert (await replica.status())["version"] == "v"

    asyncio.run(scenario())


def test_a_core_that_is_swapping_is_not_asked_and_need_not_answer():
    async def scenario():
        replica, loaded = Replica(), asyncio.Event()
        asked = asyncio.create_task(replica.status())
        await asyncio.sleep(0)

        async def load(checkpoint):
            await loaded.wait()

        replica.swap = load
        swap = asyncio.create_task(replica.load(Checkpoint(path="nowhere", version="w")))
        assert (await asked)["version"] == "v", "the swap began after the question"
        assert (await replica.status())["version"] == "v"
        loaded.set()
        await swap
        with pytest.raises(StageTimeout):
            await replica.status()

    asyncio.run(scenario())


def test_a_replica_says_how_it_is_while_it_waits_for_a_folder_to_be_fetched(monkeypatch):
    fetched = threading.Event()

    def fetch(checkpoint):
        assert fetched.wait(10)
        return checkpoint.path

    async def scenario():
        replica = Replica()
        replica.engine.goes_on.set()
        replica.spec = type("", (), {"weight_transfer": None, "dtype": "float32"})
        replica._replace = lambda *_: asyncio.sleep(0)
        swap = asyncio.create_task(replica.swap(Checkpoint(path="nowhere", version="w")))
        await asyncio.sleep(0.01)
        assert (await asyncio.wait_for(replica.status(), 5))["version"] == "v" and not swap.done()
        fetched.set()
        await swap

    monkeypatch.setattr(engine, "weights_folder", fetch)
    asyncio.run(scenario())


class ForgetfulCore(Core):
    """Takes weights, and does not reset its prefix cache."""

    async def pause_generation(self, **_):
        pass

    async def collective_rpc(self, method):
        assert method == "pack_tied_heads"

    async def reset_prefix_cache(self, **_):
        return False

    async def resume_generation(self):
        raise AssertionError("old keys and values would be read")


class ForgetfulReplica(Replica):
    def __init__(self):
        super().__init__()
        self.engine, self.labels, self._is_comparable = ForgetfulCore(), prometheus.replica(), True

    async def take_weights(self):
        await self._replace(Checkpoint(path="nowhere", version="w"), {}, lambda: asyncio.sleep(0))


def test_a_prefix_cache_that_is_not_reset_stops_the_replica(ray_cluster):
    replica = ray.remote(ForgetfulReplica).remote()
    with pytest.raises(WeightSyncError, match="not at the weights of w and is stopped: vLLM has not reset its prefix"):
        ray.get(replica.take_weights.remote(), timeout=60)
    with pytest.raises(RayActorError):
        for _ in range(100):
            ray.get(replica.status.remote(), timeout=60)
            time.sleep(0.1)
