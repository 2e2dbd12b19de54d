"""Time calls in blocks. Another process on the same core costs a call wall seconds, and hardly any of the processor's:
these decide, and on a GPU its own events."""

from __future__ import annotations

import math
import resource
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

Call = Callable[[], Any]

BLOCK_S = 0.05
_MOST_CALLS = 1_000_000


@dataclass(frozen=True)
class Block:
    """Seconds of some calls: `cost_s`, of the processor or of the GPU's stream, decides. `calls_s` are wall seconds of
    each call, on a GPU its stream's; `energy_j` is what a GPU used, where that is known."""

    cost_s: float
    cpu_s: float
    wall_s: float
    calls_s: list[float]
    energy_j: float | None = None


def cpu_seconds() -> float:
    """Of this process, all its threads, and the children that ended."""
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime


def run_block(call: Call, count: int, device: str) -> Block:
    """Call `count` times."""
    return _on_gpu(call, count) if device.startswith("cuda") else _on_cpu(call, count)


def calibrate(call: Call, device: str, block_s: float = BLOCK_S) -> int:
    """How many calls take `block_s` seconds; what a first call sets up does not count."""
    run_block(call, 1, device)
    count = 1
    while (cost_s := run_block(call, count, device).cost_s) < block_s and count < _MOST_CALLS:
        wanted = math.ceil(1.1 * count * block_s / max(cost_s, 1e-9))
        count = min(max(count + 1, wanted), 10 * count)  # so short a block says little
    return count


def summary(blocks: Sequence[Block]) -> dict[str, Any]:
    """Figures of one call, in milliseconds: quantiles of single calls, and medians over the blocks."""
    calls_s = np.concatenate([block.calls_s for block in blocks])
    p50_s, p99_s = np.quantile(calls_s, [0.5, 0.99])
    joules = [block.energy_j for block in blocks if block.energy_j is not None]

    def of_a_call(seconds: Sequence[float]) -> float:
        shares = [value / len(block.calls_s) for value, block in zip(seconds, blocks, strict=True)]
        return _rounded(1e3 * float(np.median(shares)))

    return {
        "calls": len(calls_s),
        "p50_ms": _rounded(1e3 * p50_s),
        "p99_ms": _rounded(1e3 * p99_s),
        "cost_ms": of_a_call([block.cost_s for block in blocks]),
        "cpu_ms": of_a_call([block.cpu_s for block in blocks]),
        "wall_ms": of_a_call([block.wall_s for block in blocks]),
        "energy_j": _rounded(sum(joules) / len(calls_s)) if joules else None,
    }


def _rounded(value: float) -> float:
    return float(f"{value:.4g}")


def _on_cpu(call: Call, count: int) -> Block:
    calls_s = []
    cpu, start = cpu_seconds(), time.perf_counter()
    before = start
    for _ in range(count):
        call()
        now = time.perf_counter()
        calls_s.append(now - before)
        before = now
    wall_s, cpu_s = time.perf_counter() - start, cpu_seconds() - cpu
    return Block(cpu_s, cpu_s, wall_s, calls_s)


def _on_gpu(call: Call, count: int) -> Block:
    import torch

    events = [torch.Event(device="cuda", enable_timing=True) for _ in range(count + 1)]
    torch.cuda.synchronize()
    cpu, start = cpu_seconds(), time.perf_counter()
    events[0].record()
    for event in events[1:]:
        call()
        event.record()
    torch.cuda.synchronize()
    wall_s, cpu_s = time.perf_counter() - start, cpu_seconds() - cpu
    calls_s = [before.elapsed_time(after) / 1e3 for before, after in pairwise(events)]
    return Block(sum(calls_s), cpu_s, wall_s, calls_s)
