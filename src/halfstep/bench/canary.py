"""halfstep bench canary: how often the gate errs on a busy machine, on what is the same and on what is slower."""

from __future__ import annotations

import math
import statistics
import time
from collections import Counter
from typing import Any

from halfstep.bench.cases import Case
from halfstep.bench.compare import busy_processes, document
from halfstep.bench.gate import TOLERANCE, evidence, verdicts
from halfstep.bench.race import Side, race
from halfstep.machine import cores
from halfstep.progress import SILENT, Progress

_BLOCK_S = 0.02  # shorter than a suite's, and noisier: hundreds of trials are to end in minutes
_SAME, _MORE = Case("kernel", 100, "fp32"), Case("kernel", 110, "fp32")


def bench_canary(*, trials: int = 200, progress: Progress = SILENT) -> dict[str, Any]:
    """`trials` comparisons of a small kernel with itself, and half as many with one that does 10% more, beside as many
    busy processes as there are cores. The processor's seconds decide; what wall seconds say of the same pairs is told
    beside them."""
    start = time.perf_counter()
    more_trials = (trials + 1) // 2
    progress.start(trials + more_trials)
    with busy_processes(cores()):
        same = _outcomes(trials, _SAME, progress)
        more = _outcomes(more_trials, _MORE, progress)
    return document(
        "canary",
        {},
        busy_processes=cores(),
        block_s=_BLOCK_S,
        tolerance=TOLERANCE,
        false_alarms=same["verdicts"]["slower"],
        found=more["verdicts"]["slower"],
        called_fine=more["verdicts"]["fine"],
        same=same,
        ten_percent_more=more,
        seconds_in_all=round(time.perf_counter() - start, 1),
    )


def _outcomes(trials: int, other: Case, progress: Progress) -> dict[str, Any]:
    by_cpu, by_wall = Counter[str](), Counter[str]()
    pairs, ratios = [], []
    for _ in range(trials):
        a, b = Side(_SAME), Side(other)
        found, _log_ratios = race(a, b, block_s=_BLOCK_S)
        walls = [math.log(y.wall_s / x.wall_s) for x, y in zip(a.blocks, b.blocks, strict=True)]
        by_cpu.update(verdicts([found]))
        by_wall.update(verdicts([evidence(walls)]))
        pairs.append(found.pairs)
        ratios.append(found.ratio)
        progress.advance()
        progress.show(f"{other.name}: {dict(by_cpu)}")
    return {
        "trials": trials,
        "verdicts": _all(by_cpu),
        "verdicts_by_wall_seconds": _all(by_wall),
        "pairs": {"median": statistics.median(pairs), "largest": max(pairs)},
        "ratio": {
            "median": round(statistics.median(ratios), 4),
            "smallest": round(min(ratios), 4),
            "largest": round(max(ratios), 4),
        },
    }


def _all(counts: Counter[str]) -> dict[str, int]:
    return {name: counts[name] for name in ("fine", "slower", "undecided")}
