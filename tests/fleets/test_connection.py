"""Which cluster a run uses, and the refusal of one that does not answer."""

import os
import socket
import subprocess
import sys

import pytest

from rayrl.errors import ResourceError
from rayrl.fleets import connection
from rayrl.preflight import find_cluster


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    for name in (connection.ADDRESS, connection.SUBMITTED):
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


@pytest.fixture
def unconnected(environment):
    """As in a process of its own: other tests have connected this one."""
    environment.setattr("ray.is_initialized", lambda: False)
    return environment


def test_without_an_address_a_run_starts_its_own_cluster(environment):
    assert connection.cluster_address() == "local"
    environment.setenv("RAY_ADDRESS", " ")
    assert connection.cluster_address() == "local"
    assert find_cluster().name == "a cluster of its own on this machine"


def test_a_submitted_job_belongs_to_its_cluster(environment):
    environment.setenv(connection.SUBMITTED, "{}")
    assert connection.cluster_address() == "auto"
    environment.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    assert connection.cluster_address() == "10.0.0.1:6379"


@pytest.mark.parametrize(
    ("address", "remedy"),
    [
        ("http://10.0.0.1:8265", "ray job submit --address http://10.0.0.1:8265"),
        ("ray://10.0.0.1:10001", "Ray Client"),
        ("anyscale://cluster", "ray job submit"),
    ],
)
def test_an_address_of_something_else_says_what_it_is_for(unconnected, address, remedy):
    unconnected.setenv("RAY_ADDRESS", address)
    for looks in (connection.cluster_address, find_cluster, connection.connect):
        with pytest.raises(ResourceError, match="RAY_ADDRESS must be the address of a cluster's head") as refusal:
            looks()
        assert remedy in str(refusal.value)


@pytest.mark.parametrize("address", ["127.0.0.1:1", "nothing", "127.0.0.1:port", "127.0.0.1:99999"])
def test_a_dead_address_is_refused(unconnected, address):
    unconnected.setenv("RAY_ADDRESS", address)
    with pytest.raises(ResourceError, match=r"RAY_ADDRESS must .* got .*unset it to run on this machine"):
        find_cluster()


def test_something_that_is_no_cluster_is_refused(environment):
    environment.setattr(connection, "ANSWER_S", 1.0)
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        with pytest.raises(ResourceError, match="something takes connections there, but no answer came"):
            connection.check_answers(address)


def test_a_cluster_that_answers_is_taken(ray_cluster, environment):
    import ray

    address = ray.get_runtime_context().gcs_address
    connection.check_answers(address)
    environment.setenv("RAY_ADDRESS", address)
    assert find_cluster().name == f"the cluster at {address}" and find_cluster().has("CPU") == 4.0


@pytest.mark.parametrize("token", ["ours", "another"])
def test_a_cluster_with_tokens_is_reached_by_who_has_its_token(tmp_path, token):
    """Ray's default for a cluster that a run starts: it wants the token of this user."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment |= {"HOME": str(tmp_path), "PYTHONPATH": os.pathsep.join(sys.path)}
    start = (
        "import ray, sys; ray.init(address='local', num_cpus=1, include_dashboard=False);"
        "print(ray.get_runtime_context().gcs_address, flush=True); sys.stdin.read()"
    )
    ask = "import sys; from rayrl.fleets.connection import why_unreachable; print(why_unreachable(sys.argv[1]))"
    head = subprocess.Popen(
        [sys.executable, "-c", start], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        address = head.stdout.readline().strip()
        if token == "another":
            environment |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0" * 64}
        asked = [sys.executable, "-c", ask, address]
        said = subprocess.run(asked, env=environment, capture_output=True, text=True, timeout=60).stdout
    finally:
        head.communicate("", timeout=60)
    assert said.strip() == "None" if token == "ours" else "does not take this user's token" in said
