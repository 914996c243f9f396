"""Types of Ray actor handles, on which a method is called by name: `replica.status.remote()`.

Ray's own `ActorHandle` types every method as `Never`, so that a type checker takes the code after a call for
unreachable. It is assignable to `Actor`, a protocol of what rayrl uses of a handle.
"""

from collections.abc import Mapping
from typing import Any, Protocol, cast

import ray
from ray import ObjectRef
from ray.actor import ActorHandle


class RemoteMethod(Protocol):
    """Method of an actor."""

    def remote(self, *arguments: object) -> ObjectRef:
        """Call the method in the actor's process; returns at once."""
        ...

    def options(self, **options: object) -> "RemoteMethod":
        """Return the method with other options of Ray's, such as `max_task_retries`."""
        ...


class Actor(Protocol):
    """Handle of an actor of any class."""

    def __getattr__(self, item: str, /) -> RemoteMethod:
        """Return the method of this name."""
        ...


def start(plain_class: type, options: Mapping[str, Any], *arguments: object, **keywords: object) -> ActorHandle:
    """Start an actor of a plain class; returns at once.

    Args:
        plain_class: class whose methods become the actor's.
        options: Ray's options for the actor.
        arguments: arguments of the class.
        keywords: keyword arguments of the class.
    """
    actor_class: Any = ray.remote(plain_class)  # Ray types what this returns as a handle or the class itself
    return actor_class.options(**options).remote(*arguments, **keywords)


def kill(actor: Actor, *, no_restart: bool) -> None:
    """End an actor's process at once. Unless `no_restart`, Ray starts another one in its place."""
    ray.kill(cast("ActorHandle", actor), no_restart=no_restart)
