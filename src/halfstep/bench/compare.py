"""Measure things against each other: in turn within one run, medians and spread, with the machine and the command."""

from __future__ import annotations

import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

from halfstep.bench.facts import machine


@dataclass(frozen=True)
class Timing:
    """Seconds of the rounds of one case."""

    median: float
    smallest: float
    largest: float
    rounds: int


def in_turn(cases: dict[str, Callable[[], float | None]], rounds: int) -> dict[str, Timing]:
    """Run all cases once a round, `rounds` times, so that a busy moment falls on all of them.

    A case returns the seconds that count, or None for all of its own.
    """
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    for _ in range(rounds):
        for name, case in cases.items():
            start = time.perf_counter()
            own = case()
            seconds[name].append(time.perf_counter() - start if own is None else own)
    return {
        name: Timing(statistics.median(values), min(values), max(values), rounds) for name, values in seconds.items()
    }


def ratio(timings: dict[str, Timing], baseline: str, ours: str) -> float:
    """How many times as fast `ours` is as `baseline`, by medians."""
    return round(timings[baseline].median / timings[ours].median, 2)


def document(name: str, timings: dict[str, Timing], **facts: Any) -> dict[str, Any]:
    """The JSON of one benchmark: what was measured, on what, by which command."""
    return {
        "benchmark": name,
        "command": shlex.join(["halfstep", *sys.argv[1:]]),
        "machine": machine(),
        "seconds": {
            case: {k: v if k == "rounds" else _rounded(v) for k, v in asdict(timing).items()}
            for case, timing in timings.items()
        },
        **facts,
    }


@contextmanager
def busy_processes(count: int) -> Iterator[None]:
    """So many processes that do nothing but compute."""
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for process in busy:
            process.kill()
            process.wait()


def _rounded(value: float) -> float:
    return float(f"{value:.4g}")
