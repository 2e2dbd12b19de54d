"""A chain of stages, each on its own thread: items pass through all of them in order, and only so many wait."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable
from types import TracebackType
from typing import Any, Generic, Self, TypeVar

from halfstep.engine.queue import ByteQueue, Closed

A = TypeVar("A")
B = TypeVar("B")


class Stage(Generic[A, B]):
    """What happens to an item at one place; all of it in one thread, so a stage may keep state. A stage that works on
    several items at once hands on futures, for which the next stage waits."""

    name = "stage"
    room = 2  # the sizes of the items that wait before it together
    drops = False  # instead of waiting for room, let go of the oldest items that wait

    def size(self, item: A) -> int:
        """Of an item that waits: one, or its bytes where `room` is in bytes."""
        return 1

    def drop(self, item: A) -> None:
        """An item was let go of; called from the thread of the stage before."""

    def work(self, item: A) -> Iterable[B]:
        """What goes on to the next stage; nothing, where the stage gathers."""
        raise NotImplementedError

    def deadline(self) -> float | None:
        """When (`time.monotonic`) what was gathered must go on at the latest, also if no other item comes."""
        return None

    def flush(self) -> Iterable[B]:
        """What was gathered: at the deadline, and when all items have come."""
        return ()


class Flow:
    """`put` items in; leaving the context waits until they are through. When a stage fails nothing more is worked on:
    its error is raised by the next `put`, or on the way out. When the context is left by an exception, what waits is
    let go."""

    def __init__(self, *stages: Stage[Any, Any]) -> None:
        self._failed = threading.Event()
        self._error: BaseException | None = None
        self._stages = stages
        self._queues = [ByteQueue[Any](stage.room, stage.drop if stage.drops else None) for stage in stages]
        self._threads = [
            threading.Thread(target=self._run, args=(place, stage), name=stage.name)
            for place, stage in enumerate(stages)
        ]
        for thread in self._threads:
            thread.start()

    def put(self, item: Any, timeout_s: float | None = None) -> bool:
        """Waits while there is no room; False when that was so for `timeout_s`."""
        self.check()
        taken = self._queues[0].put(item, self._stages[0].size(item), timeout_s)
        self.check()
        return taken

    def check(self) -> None:
        """Raise the error of a stage that has failed."""
        if self._error is not None:
            raise self._error

    def waiting(self) -> dict[str, int]:
        """Sizes of what waits before each stage, by its name."""
        return {stage.name: queue.held for stage, queue in zip(self._stages, self._queues, strict=True)}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, _: BaseException | None, __: TracebackType | None) -> None:
        if kind is not None:
            self._failed.set()
        self._queues[0].close()
        try:
            for thread in self._threads:
                thread.join()
        except BaseException:  # asked again to stop: what waits is let go
            self._failed.set()
            raise
        if kind is None and self._error is not None:
            raise self._error

    def _run(self, place: int, stage: Stage[Any, Any]) -> None:
        ended = False
        while not ended:
            try:
                deadline = None if self._failed.is_set() else stage.deadline()
                item = self._queues[place].get(_seconds_to(deadline))
                due = False
            except TimeoutError:
                due = True
            except Closed:
                due = ended = True
            if self._failed.is_set():
                continue
            try:
                for result in stage.flush() if due else stage.work(item):
                    if place + 1 < len(self._queues):
                        self._queues[place + 1].put(result, self._stages[place + 1].size(result))
            except BaseException as error:  # noqa: BLE001 - raised in the thread that puts
                self._error = error
                self._failed.set()
        if place + 1 < len(self._queues):
            self._queues[place + 1].close()


def _seconds_to(deadline: float | None) -> float | None:
    return None if deadline is None else min(max(0.0, deadline - time.monotonic()), threading.TIMEOUT_MAX)
