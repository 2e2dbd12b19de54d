"""The energy that a GPU uses, where NVML counts it."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any


def energy_meter(device: str) -> Callable[[], float] | str:
    """Joules that a GPU has used since it was started, to be read at any time; or the reason why nobody counts them."""
    if not device.startswith("cuda"):
        return "only of GPUs"
    import torch

    try:
        nvml: Any = import_module("pynvml")
    except ImportError:
        return "pynvml is not installed"
    try:
        nvml.nvmlInit()
        uuid = torch.cuda.get_device_properties(torch.device(device)).uuid
        handle = nvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")
        nvml.nvmlDeviceGetTotalEnergyConsumption(handle)
    except nvml.NVMLError as error:
        return f"NVML: {error}"
    return lambda: float(nvml.nvmlDeviceGetTotalEnergyConsumption(handle)) / 1e3
