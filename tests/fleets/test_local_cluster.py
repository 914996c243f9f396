"""Clusters of several nodes on this machine: drivers, their actors, and nodes that come and go."""

import sys
from pathlib import Path

import pytest

from rayrl.fleets.local_cluster import LocalCluster, kill_process, processes, wait_until

ROOT = Path(__file__).parents[2]
PROGRAM = """
import time
import ray

@ray.remote
class Sleeper:
    def folder(self):
        import os
        return os.getcwd(), os.environ["MARK"]

ray.init(log_to_driver=False)
sleeper = Sleeper.options(num_cpus=1).remote()
print(*ray.get(sleeper.folder.remote()), flush=True)
time.sleep(1000)
"""


def test_a_wait_returns_the_value_or_names_what_is_missing():
    values = iter([[], None, 3])
    assert wait_until(lambda: next(values), 10, "a value") == 3
    with pytest.raises(TimeoutError, match="waited 0 s for nothing"):
        wait_until(lambda: 0, 0, "nothing")


@pytest.mark.slow
def test_actors_end_with_their_driver_and_a_killed_node_makes_room_for_another(tmp_path):
    log = tmp_path / "driver.log"
    with LocalCluster(tmp_path, num_workers=1, num_cpus=1, working_dir=ROOT, environment={"MARK": "here"}) as cluster:
        driver = cluster.run([sys.executable, "-c", PROGRAM], log)
        wait_until(lambda: "here" in log.read_text() or driver.poll() is not None, 90, "the actor's answer")
        assert log.read_text().split()[-2:] == [str(ROOT), "here"], log.read_text()
        assert len(cluster.actors("Sleeper")) == 1
        kill_process(driver)
        wait_until(lambda: not cluster.actors("Sleeper"), 60, "the end of the driver's actors")
        (node,) = cluster.workers
        assert cluster.node_id(node) and not cluster.is_given_up(node)
        cluster.kill(node)
        assert cluster.workers == [] and processes(node) == []
        assert cluster.add() in cluster.workers
