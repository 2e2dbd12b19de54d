"""Which events were seen: by number where the producer numbers, else by name and content."""

from __future__ import annotations

import threading
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from enum import Enum

from halfstep.stream.events import Identity
from halfstep.stream.protocol import Ranges

_MOST_REMEMBERED = 50_000  # events, of those that must be remembered one by one


class Numbers:
    """A set of whole numbers as intervals: small, however many they are, as long as few are missing."""

    def __init__(self) -> None:
        self._starts: list[int] = []
        self._ends: list[int] = []  # of the intervals, inclusive

    def __contains__(self, number: int) -> bool:
        place = bisect_right(self._starts, number) - 1
        return place >= 0 and number <= self._ends[place]

    def __len__(self) -> int:
        return sum(end - start + 1 for start, end in zip(self._starts, self._ends, strict=True))

    def add(self, number: int) -> None:
        self.add_range(number, number)

    def add_range(self, first: int, last: int) -> None:
        """All from `first` to `last`."""
        left, right = bisect_right(self._ends, first - 2), bisect_right(self._starts, last + 1)
        if left < right:
            first, last = min(first, self._starts[left]), max(last, self._ends[right - 1])
        self._starts[left:right], self._ends[left:right] = [first], [last]

    def intervals(self) -> Iterator[tuple[int, int]]:
        """First and last of each."""
        return zip(self._starts, self._ends, strict=True)

    def within(self, first: int, last: int) -> Ranges:
        """What of the range from `first` to `last` is in the set, as ranges."""
        left, right = bisect_right(self._ends, first - 1), bisect_right(self._starts, last)
        found = zip(self._starts[left:right], self._ends[left:right], strict=True)
        return [(max(start, first), min(end, last)) for start, end in found]

    def gaps(self, first: int, count: int | None) -> list[tuple[int, int]]:
        """First and last of what is missing from `first` on, up to the largest, or among `count` numbers."""
        last = first + count - 1 if count is not None else (self._ends[-1] if self._ends else first - 1)
        found, at = [], first
        for start, end in self.intervals():
            if start > at:
                found.append((at, min(start - 1, last)))
            at = max(at, end + 1)
        if at <= last:
            found.append((at, last))
        return [(start, end) for start, end in found if start <= last]


class Verdict(Enum):
    """What an event that comes is."""

    NEW = "new"
    LEASED = "leased"  # the same is under way
    COMMITTED = "committed"  # the same is on disk
    OTHER = "other"  # under a number that another event has


class Seen:
    """Keeps account of events by their identities and the checksum of their data, for several threads. Of a producer
    that numbers, numbers are kept for good, and checksums of the latest events; without numbers, names and checksums of
    the latest. An event without number and name is always new."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._leased: dict[object, int] = {}  # checksums
        self._recent: OrderedDict[object, int] = OrderedDict()
        # By run and source:
        self._committed: dict[tuple[str, str], Numbers] = {}
        self._refused: dict[tuple[str, str], Numbers] = {}

    def lease(self, identity: Identity, crc: int) -> Verdict:
        """What the event is; a new one is under way from now on."""
        key = _key(identity, crc)
        if key is None:
            return Verdict.NEW
        with self._lock:
            before = self._leased.get(key, self._recent.get(key))
            if before is not None and before != crc:
                return Verdict.OTHER
            if key in self._leased:
                return Verdict.LEASED
            if key in self._recent or identity.sequence in self._committed.get(identity[:2], ()):
                return Verdict.COMMITTED
            self._leased[key] = crc
            return Verdict.NEW

    def commit(self, identity: Identity, crc: int) -> None:
        """The event is on disk."""
        key = _key(identity, crc)
        if key is None:
            return
        with self._lock:
            self._leased.pop(key, None)
            if identity.sequence >= 0:
                self._committed.setdefault(identity[:2], Numbers()).add(identity.sequence)
            self._recent[key] = crc
            if len(self._recent) > _MOST_REMEMBERED:
                self._recent.popitem(last=False)

    def refuse(self, identity: Identity) -> None:
        """The event cannot be used; should it come again, it is looked at again."""
        if identity.sequence >= 0:
            with self._lock:
                self._refused.setdefault(identity[:2], Numbers()).add(identity.sequence)

    def release(self, identity: Identity, crc: int) -> None:
        """The event is not under way any more; it may come again."""
        with self._lock:
            self._leased.pop(_key(identity, crc), None)

    def states(self, run: str, source: str, asked: Iterable[tuple[int, int]]) -> tuple[Ranges, Ranges, Ranges]:
        """Of the numbers in the ranges `asked`, those that are committed, leased and refused, as ranges."""
        asked = list(asked)
        with self._lock:
            done, bad = (by.get((run, source), Numbers()) for by in (self._committed, self._refused))
            committed, leased, refused = (
                [found for first, last in asked for found in numbers.within(first, last)]
                for numbers in (done, self._under_way(run, source), bad)
            )
        return committed, leased, refused

    def gaps(self, run: str, source: str, count: int | None) -> list[tuple[int, int]]:
        """First and last of the numbers that are neither committed, leased nor refused: among `count` from 0 on, or
        without it up to the largest."""
        with self._lock:
            known = Numbers()
            for by in (self._committed, self._refused):
                for first, last in by.get((run, source), Numbers()).intervals():
                    known.add_range(first, last)
            for first, last in self._under_way(run, source).intervals():
                known.add_range(first, last)
        return known.gaps(0, count)

    def _under_way(self, run: str, source: str) -> Numbers:
        numbers = Numbers()
        for key in self._leased:
            if isinstance(key, tuple) and key[:2] == (run, source) and isinstance(key[2], int):
                numbers.add(key[2])
        return numbers

    def producers(self) -> list[tuple[str, str]]:
        """Runs and sources of whom events with numbers are known."""
        with self._lock:
            return sorted({*self._committed, *self._refused})


def _key(identity: Identity, crc: int) -> object:
    run, source, event, sequence = identity
    if sequence >= 0:
        return run, source, sequence
    return (run, source, event, crc) if event else None
