"""What a run measures while it goes, in memory that does not grow."""

from __future__ import annotations

import threading
import time
from collections import deque

import numpy as np

_KEPT = 8192  # of the latest durations of each kind
_RATE_S = 10.0
_PACED, _PAUSE_S = 64, 2.0


class Meter:
    """Durations by name, of which the latest are kept, and sums by name; safe between threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._durations: dict[str, deque[float]] = {}
        self._sums: dict[str, float] = {}
        self._recent: deque[tuple[float, int]] = deque(maxlen=1024)
        self.started = time.monotonic()

    def took(self, name: str, seconds: float) -> None:
        with self._lock:
            self._durations.setdefault(name, deque(maxlen=_KEPT)).append(seconds)

    def add(self, name: str, value: float = 1) -> None:
        with self._lock:
            self._sums[name] = self._sums.get(name, 0) + value

    def came_out(self, events: int) -> None:
        """Events were committed, for the rate."""
        with self._lock:
            self._recent.append((time.monotonic(), events))

    def total(self, name: str) -> float:
        with self._lock:
            return self._sums.get(name, 0)

    def rate(self) -> float:
        """Events a second, over the last ten seconds."""
        now = time.monotonic()
        with self._lock:
            events = sum(count for at, count in self._recent if now - at <= _RATE_S)
        return events / max(min(now - self.started, _RATE_S), 1e-3)

    def pace(self) -> float:
        """Events a second while they come: by the median of the latest intervals, without pauses; 0 before two came."""
        with self._lock:
            times = [at for at, _ in self._recent][-_PACED:]
        intervals = [interval for interval in np.diff(times) if interval < _PAUSE_S]
        return 1 / max(float(np.median(intervals)), 1e-6) if intervals else 0.0

    def forget(self) -> None:
        """Durations from here on are of something else."""
        with self._lock:
            self._durations.clear()

    def latency(self) -> dict[str, dict[str, float]]:
        """By name the median and the 99th percentile of the latest durations, in milliseconds."""
        with self._lock:
            kept = {name: list(values) for name, values in self._durations.items()}
        return {
            name: {"p50": round(1e3 * float(np.median(v)), 3), "p99": round(1e3 * float(np.percentile(v, 99)), 3)}
            for name, v in kept.items()
        }

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.started
