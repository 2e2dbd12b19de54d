"""A place for the newest of something: what nobody took in time is dropped, and counted."""

from __future__ import annotations

import threading
from typing import Generic, TypeVar

T = TypeVar("T")


class Newest(Generic[T]):
    """`put` from any thread, `take` from another; there is one at most."""

    def __init__(self) -> None:
        self._ready = threading.Condition()
        self._item: T | None = None
        self.dropped = 0

    def put(self, item: T) -> None:
        with self._ready:
            self.dropped += self._item is not None
            self._item = item
            self._ready.notify()

    def take(self, timeout_s: float | None = None) -> T | None:
        """The newest that was not taken yet; None where none came in time."""
        with self._ready:
            self._ready.wait_for(lambda: self._item is not None, timeout_s)
            item, self._item = self._item, None
            return item
