"""Functions that run in actors on a Ray cluster, as the lanes of this process see them."""

from __future__ import annotations

import importlib.util
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from typing import Any, TypeVar

from halfstep.errors import HalfstepError, InputError

A = TypeVar("A")
B = TypeVar("B")

_ATTEMPTS = 3
_RESTART_S = 60.0


class RemoteError(HalfstepError):
    """An actor died each time that it was given an item."""


def require_ray() -> None:
    """Raise InputError when Ray is not installed."""
    if importlib.util.find_spec("ray") is None:
        raise InputError("--ray: ray is not installed; pip install 'halfstep[ray]'")


@dataclass(frozen=True)
class Resources:
    cpus: int
    gpus: int


@contextmanager
def cluster() -> Iterator[Resources]:
    """A Ray cluster within the block: the one that RAY_ADDRESS names or this process is part of, else one started
    here."""
    import ray

    if ray.is_initialized():
        yield _resources()
        return
    with redirect_stdout(sys.stderr):  # on stdout Ray says that an actor died, amid what is read from there
        ray.init(log_to_driver=False, logging_level="ERROR", include_dashboard=False)
        try:
            yield _resources()
        finally:
            ray.shutdown()


def _resources() -> Resources:
    import ray

    found = ray.cluster_resources()
    return Resources(int(found.get("CPU", 1)), int(found.get("GPU", 0)))


@contextmanager
def remote_functions(function: Callable[[A], B], count: int, *, gpus: bool) -> Iterator[list[Callable[[A], B]]]:
    """`count` copies of a function that can be pickled, each in an actor of its own with one core, and one GPU with
    `gpus`; within a block of `cluster`.

    An actor whose process dies is started again. The item is kept here and given to it again; after three deaths its
    call raises RemoteError. Ray itself repeats nothing: it would not keep the order, nor the account.
    """
    import ray

    carried = ray.put(function)
    actors = [
        ray.remote(_Actor)
        .options(num_cpus=1, num_gpus=int(gpus), max_restarts=-1, max_task_retries=0)
        .remote([carried])
        for _ in range(count)
    ]
    try:
        yield [_Remote(actor) for actor in actors]
    finally:
        for actor in actors:
            ray.kill(actor)


class _Actor:
    def __init__(self, carried: list[Any]) -> None:
        import ray

        self._function: Callable[[Any], Any] = ray.get(carried[0])

    def call(self, item: Any) -> Any:
        return self._function(item)

    def is_there(self) -> bool:
        return True


class _Remote:
    def __init__(self, actor: Any) -> None:
        self._actor = actor

    def __call__(self, item: Any) -> Any:
        import ray

        for _ in range(_ATTEMPTS):
            try:
                return ray.get(self._actor.call.remote(item))
            except ray.exceptions.RayActorError as error:
                died = error
                self._wait_for_restart()
        raise RemoteError(f"an actor died {_ATTEMPTS} times on the same item: {str(died).splitlines()[0]}") from died

    def _wait_for_restart(self) -> None:
        """Calls of an actor that is being started again fail, which is not the item's fault."""
        import ray

        latest = time.monotonic() + _RESTART_S
        while True:
            try:
                ray.get(self._actor.is_there.remote())
                return
            except ray.exceptions.RayActorError as error:
                if time.monotonic() > latest:
                    raise RemoteError(f"an actor could not be started again: {str(error).splitlines()[0]}") from error
            time.sleep(0.1)
