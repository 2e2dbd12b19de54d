"""Facts about the machine: its device, its cores, its memory. MB are 10^6 bytes."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import TYPE_CHECKING

from halfstep.errors import InputError

if TYPE_CHECKING:
    import torch

# torch is imported where a device is asked for: stores ask for cores alone, and are read without it.


def cores() -> int:
    """The processor's cores that this process may use."""
    return len(os.sched_getaffinity(0))


def open_device(device: str | torch.device) -> torch.device:
    """The device, `auto` for a GPU where there is one, once torch has put a tensor on it. Raises InputError when it
    cannot."""
    import torch

    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        target = torch.device(device)
        torch.empty(1, device=target)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"device: got {str(device)!r}; expected one that torch can use here ({reason})") from error
    return target


def device_name(device: torch.device) -> str:
    """What a figure depends on: the card's name, or the processor's and the instructions that torch uses."""
    import torch

    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type == "cpu":
        return f"{_processor()} ({torch.backends.cpu.get_cpu_capability()})"
    return device.type


def peak_memory_mb(device: torch.device) -> float:
    """The most memory, in MB, that this process ever held: the allocator's on a GPU, else its resident memory."""
    import torch

    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e6
    status = Path("/proc/self/status").read_text()
    kibibytes = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM"))
    return kibibytes * 1024 / 1e6


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
