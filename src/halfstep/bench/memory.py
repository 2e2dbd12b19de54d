"""The most memory that a call holds, in a process that does nothing else. MB are 10^6 bytes."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from halfstep.machine import peak_memory_mb

# For the process's environment. Each large buffer is a mapping of its own then (mallopt(3)): what the C library keeps
# of buffers that were freed is not counted.
ENVIRONMENT = {"MALLOC_MMAP_THRESHOLD_": "65536"}


@dataclass(frozen=True)
class Peak:
    """MB resident in the process, or allocated on the GPU: `held_mb` before a call, `peak_mb` at most during it."""

    held_mb: float
    peak_mb: float


def peak_of(call: Callable[[], Any], device: torch.device) -> Peak:
    """Of one call. What libraries set up on their first call is to be there already."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)  # what was freed is not to be used again unseen
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        held_mb = torch.cuda.memory_allocated(device) / 1e6
    else:
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins anew (proc(5))
        held_mb = resident_mb()
    call()
    return Peak(held_mb, peak_memory_mb(device))


def resident_mb() -> float:
    """What this process holds in memory now."""
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmRSS")) * 1024 / 1e6
