"""Random events, for trials without a detector."""

from __future__ import annotations

import numpy as np

from halfstep.stream.events import Event, Identity, Message
from halfstep.stream.sources.base import Incoming, Source


class RandomSource(Source):
    """`count` events of normal noise, float32 of `shape` [C, H, W]; without end when None. The same on every run."""

    guarantee = "numbered"

    def __init__(self, shape: tuple[int, int, int], count: int | None = None) -> None:
        self._shape, self._count, self._next = shape, count, 0
        self.exhausted = count == 0

    def receive(self, timeout_s: float) -> Incoming:
        number = self._next
        self._next += 1
        self.exhausted = self._next == self._count
        size = 4 * int(np.prod(self._shape))
        return Incoming(size, lambda: self._message(number), b"", "random")

    def _message(self, number: int) -> Message:
        data = np.random.default_rng(number).standard_normal(self._shape, np.float32)
        event = Event(Identity("random", "random", str(number), number), data, {"timestamp": float(number)})
        return Message((event,), "random", "random")
