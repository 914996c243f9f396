"""Connection to Ray: which cluster a run uses, and the refusal of one that does not answer.

A run joins the cluster that RAY_ADDRESS names; inside a submitted job Ray sets it. Without it a run starts a cluster of
its own, whatever else goes on on the machine: Ray's own default would join any cluster that it finds there.
"""

import importlib
import logging
import os
import socket
import threading
from urllib.parse import urlsplit

from rayrl.errors import ResourceError

NAMESPACE = "rayrl"
"""Ray namespace of every run's named actors."""
ADDRESS = "RAY_ADDRESS"
SUBMITTED = "RAY_JOB_CONFIG_JSON_ENV_VAR"
"""Environment variable that Ray sets for the entry point of a submitted job."""
LOCAL = "local"
"""Ray's word for a cluster of one's own."""
REACH_S = 5.0
"""Longest wait for the cluster's machine to take a connection."""
ANSWER_S = 10.0
"""Longest wait for the cluster's head to answer."""


def cluster_address() -> str:
    """Return the address of the cluster that a run of this process uses; `LOCAL` for one that it starts itself.

    Raises:
        ResourceError: RAY_ADDRESS is the address of something else, such as a dashboard's.
    """
    address = os.environ.get(ADDRESS, "").strip()
    if not address:
        # A submitted job whose environment has lost the address still belongs to the cluster that it runs in.
        return "auto" if SUBMITTED in os.environ else LOCAL
    kind = urlsplit(address).scheme if "://" in address else ""
    if kind in ("http", "https"):
        raise ResourceError(
            f"{ADDRESS} must be the address of a cluster's head, host:port (6379 by default), got {address}, the "
            "address of a dashboard, to which jobs are submitted: ray job submit --address "
            f"{address} -- python jobs/...; or unset it to run on this machine"
        )
    if kind:
        why = "Ray Client runs a driver outside of the cluster, which has no access to its nodes' files"
        raise ResourceError(
            f"{ADDRESS} must be the address of a cluster's head, host:port (6379 by default), got {address}"
            f"{': ' + why if kind == 'ray' else ''}; run this command on a node of the cluster, or submit it with "
            "`ray job submit`, or unset it to run on this machine"
        )
    return address


def describe_address(address: str) -> str:
    """Say which cluster an address of `cluster_address` is."""
    return "a cluster of its own on this machine" if address == LOCAL else f"the cluster at {address}"


def check_answers(address: str) -> None:
    """Refuse the address of a cluster that does not answer, within `REACH_S` and `ANSWER_S` together.

    Raises:
        ResourceError: nothing there, something else than Ray, or a cluster that does not take this user's token.
    """
    if address in (LOCAL, "auto"):
        return
    remedy = f"start it, correct {ADDRESS}, or unset it to run on this machine"
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit():
        raise ResourceError(f"{ADDRESS} must be host:port, got {address}; {remedy}")
    reason = why_unreachable(address)
    if reason is not None:
        raise ResourceError(f"{ADDRESS} must name a running cluster, got {address}: {reason}; {remedy}")


def why_unreachable(address: str) -> str | None:
    """Say why the head of a cluster at host:port does not answer; None if it does.

    Ray itself would try for a quarter of an hour.
    """
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=REACH_S).close()
    except (OSError, OverflowError) as error:
        return str(error)
    reached = threading.Event()
    failure: list[str] = []

    def reach() -> None:
        try:
            # As `ray.init` does for an address: by default a cluster wants the token of the user who has started it.
            tokens = importlib.import_module("ray._private.authentication.authentication_token_setup")
            tokens.maybe_enable_token_auth_if_token_available(warn_if_disabled=False)
            # Compiled code, whose names type checkers do not see.
            importlib.import_module("ray._raylet").GcsClient(address=address)
        except Exception as error:
            failure.append(str(error))
        reached.set()

    # A thread, since Ray gives a connection up after 40 s only.
    threading.Thread(target=reach, name="reach", daemon=True).start()
    if not reached.wait(ANSWER_S):
        return f"something takes connections there, but no answer came in {ANSWER_S:.0f} s"
    if failure and "AuthToken" in failure[0]:
        return "it does not take this user's token (~/.ray/auth_token, or RAY_AUTH_TOKEN), which must be the cluster's"
    return failure[0] if failure else None


def connect() -> None:
    """Connect this process to its cluster, or start one; do nothing if it is connected.

    Raises:
        ResourceError: the cluster does not answer, or this machine is no node of it.
    """
    # Only here: ray takes seconds to import, and a plan for this machine needs none of it.
    import ray

    if ray.is_initialized():
        return
    address = cluster_address()
    check_answers(address)
    try:
        ray.init(
            address=address,
            namespace=NAMESPACE,
            include_dashboard=None,
            log_to_driver=False,
            logging_level=logging.WARNING,
        )
    except Exception as error:  # Ray raises plain ones, too, as when its processes do not start in time
        if address == LOCAL:
            raise ResourceError(
                f"Ray must start on this machine, and did not: {error}; run the same command again, when less else "
                "runs here"
            ) from None
        raise ResourceError(
            f"{ADDRESS} must name a running cluster that this machine is a node of, got {address}: {error}; run this "
            "command on one of its nodes, or submit it with `ray job submit`"
        ) from None
