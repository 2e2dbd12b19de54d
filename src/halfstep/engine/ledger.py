"""The books of a run: what came in is what went out, was skipped, refused or dropped, or is still under way."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Generic, TypeVar

T = TypeVar("T")


@dataclass(frozen=True)
class Balance:
    """Items. `skipped` were there already, `refused` could not be used, `dropped` had to make room, `leased` are still
    under way. `retried` of those that went out were computed again in fp32."""

    came: int = 0
    out: int = 0
    skipped: int = 0
    refused: int = 0
    dropped: int = 0
    leased: int = 0
    retried: int = 0

    @classmethod
    def total(cls, parts: Iterable[Balance]) -> Balance:
        """The balance of several processes together."""
        rows = [(p.came, p.out, p.skipped, p.refused, p.dropped, p.leased, p.retried) for p in parts]
        return cls(*map(sum, zip(*rows, strict=True)))

    @property
    def clean(self) -> bool:
        """Whether all that came went out, or was there."""
        return self.came == self.out + self.skipped


class Ledger(Generic[T]):
    """Keeps the books of one process, from any thread. Whatever is refused or dropped is named: `tell` hears of it."""

    def __init__(self, tell: Callable[[T], None]) -> None:
        self._tell = tell
        self._lock = threading.Lock()
        self._came = self._out = self._skipped = self._refused = self._dropped = self._retried = 0

    def take(self, items: int = 1) -> None:
        """Items come in: they are leased until they are settled."""
        with self._lock:
            self._came += items

    def give(self, items: int = 1, *, retried: bool = False) -> None:
        """Leased items went out."""
        with self._lock:
            self._out += items
            self._retried += items if retried else 0

    def skip(self, items: int = 1) -> None:
        """Leased items turned out to be there already."""
        with self._lock:
            self._skipped += items

    def refuse(self, entry: T) -> None:
        """A leased item cannot be used: `entry` says which and why."""
        with self._lock:
            self._refused += 1
        self._tell(entry)

    def drop(self, entry: T) -> None:
        """A leased item had to make room: `entry` says which."""
        with self._lock:
            self._dropped += 1
        self._tell(entry)

    @property
    def balance(self) -> Balance:
        with self._lock:
            settled = self._out + self._skipped + self._refused + self._dropped
            return Balance(
                self._came, self._out, self._skipped, self._refused, self._dropped, self._came - settled, self._retried
            )
