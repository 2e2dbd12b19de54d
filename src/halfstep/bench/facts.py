"""What a figure depends on: the machine, the versions, and every switch that changes how fast torch computes."""

from __future__ import annotations

import platform
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

import halfstep
from halfstep.machine import cores, device_name, open_device


def machine(device: str = "auto") -> dict[str, Any]:
    """The machine and the versions."""
    return {
        "device": device_name(open_device(device)),
        "cores": cores(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "halfstep": halfstep.__version__,
    }


def switches(call: Callable[[], Any]) -> dict[str, Any]:
    """Every switch as the innermost modules find it while `call` runs once: what stands around them (autocast, TF32) is
    set and put back there. A list where they find several; outside, where there are no modules."""
    found: dict[str, dict[Any, None]] = {}

    def look(module: torch.nn.Module | None = None, inputs: Any = ()) -> None:
        device = next((value.device.type for value in inputs if isinstance(value, torch.Tensor)), "cpu")
        if (module is None or not any(True for _ in module.children())) and device != "meta":
            for name, value in _now(device).items():
                found.setdefault(name, {})[value] = None

    handle = torch.nn.modules.module.register_module_forward_pre_hook(look)
    try:
        call()
    finally:
        handle.remove()
    if not found:
        look()
    return {name: next(iter(values)) if len(values) == 1 else list(values) for name, values in found.items()}


def _now(device: str) -> dict[str, Any]:
    autocast = torch.is_autocast_enabled(device)
    return {
        "threads": torch.get_num_threads(),
        "autocast": str(torch.get_autocast_dtype(device)).removeprefix("torch.") if autocast else None,
        "tf32_matmul": torch.backends.cuda.matmul.allow_tf32,
        "tf32_cudnn": torch.backends.cudnn.allow_tf32,
        "cudnn_benchmark": torch.backends.cudnn.benchmark,
        "cudnn_deterministic": torch.backends.cudnn.deterministic,
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "compile": torch.compiler.is_compiling(),
        "grad": torch.is_grad_enabled(),
    }
