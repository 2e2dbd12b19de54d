"""A queue between threads that is bounded in bytes, or in whatever sizes are counted."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")


class Closed(Exception):
    """The queue was closed: nothing more goes in, or nothing more comes out."""


class ByteQueue(Generic[T]):
    """Items in order, together of the size `room` at most; one that is larger goes in alone.

    A `put` waits while there is no room. With `on_drop` it does not wait: the oldest items make room, and each is
    handed to `on_drop`, in the thread that puts.
    """

    def __init__(self, room: int, on_drop: Callable[[T], None] | None = None) -> None:
        self._room, self._on_drop = room, on_drop
        self._items: deque[tuple[T, int]] = deque()
        self._held = 0
        self._closed = False
        self._changed = threading.Condition()

    @property
    def held(self) -> int:
        """The size of what is in it."""
        return self._held

    def put(self, item: T, size: int, timeout_s: float | None = None) -> bool:
        """Add an item; False when there was no room for so long. Raises Closed after `close`."""
        dropped: list[T] = []
        with self._changed:
            if self._on_drop is None:
                free = self._changed.wait_for(lambda: self._closed or self._has_room(size), timeout_s)
            else:
                while not self._has_room(size):
                    dropped.append(self._pop())
                free = True
            if self._closed:
                raise Closed
            if free:
                self._items.append((item, size))
                self._held += size
                self._changed.notify_all()
        for old in dropped:
            assert self._on_drop is not None
            self._on_drop(old)
        return free

    def get(self, timeout_s: float | None = None) -> T:
        """The oldest item. Raises TimeoutError when none came for so long, Closed when none will come."""
        with self._changed:
            if not self._changed.wait_for(lambda: self._closed or bool(self._items), timeout_s):
                raise TimeoutError
            if not self._items:
                raise Closed
            item = self._pop()
            self._changed.notify_all()
            return item

    def close(self) -> None:
        """Take no more; what is there can still be had."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def _has_room(self, size: int) -> bool:
        return not self._items or self._held + size <= self._room

    def _pop(self) -> T:
        item, size = self._items.popleft()
        self._held -= size
        return item
