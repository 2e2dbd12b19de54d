"""Lanes: functions that each work on one batch at a time, side by side.

On a CPU each lane is one thread that computes on one core, with as many lanes as cores. Splitting single operations
over cores instead is no faster for the networks here, and sums in an order that depends on the number of cores: with
lanes, a result is the same bit for bit whatever the machine's size and the number of processes.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Generic, TypeVar

import torch

from halfstep.team import own_cores

A = TypeVar("A")
B = TypeVar("B")


class Lanes(Generic[A, B]):
    """`submit` items; each future gives what the function of one lane, whichever is free, makes of it."""

    def __init__(self, functions: Sequence[Callable[[A], B]], name: str) -> None:
        self.count = len(functions)
        self._unassigned = list(functions)
        self._lane = threading.local()
        self._pool = ThreadPoolExecutor(self.count, name, initializer=self._begin)

    @classmethod
    @contextmanager
    def open(cls, functions: Sequence[Callable[[A], B]], name: str) -> Iterator[Lanes[A, B]]:
        """A lane for each of `functions`; one that may be called by several threads at once can stand there several
        times. On the way out what has begun is finished, and the rest is not begun."""
        lanes = cls(functions, name)
        threads = torch.get_num_threads()
        try:
            yield lanes
        finally:
            lanes._pool.shutdown(cancel_futures=True)
            torch.set_num_threads(threads)  # a new thread's number becomes everybody's

    def submit(self, item: A) -> Future[B]:
        return self._pool.submit(self._work, item)

    def _begin(self) -> None:
        torch.set_num_threads(1)
        self._lane.function = self._unassigned.pop()

    def _work(self, item: A) -> B:
        result: B = self._lane.function(item)
        return result


def lane_count(device: torch.device, *, shared: bool) -> int:
    """How many lanes suit a device; `shared`: its one function may be called by several threads at once."""
    if device.type == "cpu":
        return own_cores()
    # One batch computes while the other is copied and converted; a second model in memory is not worth it.
    return 2 if shared else 1
