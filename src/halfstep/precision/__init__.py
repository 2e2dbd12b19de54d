"""Choose a precision in one place, measure whether the device has it, apply it to a module."""

from halfstep.precision.apply import change_compute, prepare
from halfstep.precision.policy import PRESETS, STORAGE_TYPES, PrecisionPolicy, torch_dtype
from halfstep.precision.probe import ProbeResult, TypeReport, open_device, probe, slowness, tf32, usable

__all__ = [
    "PRESETS",
    "STORAGE_TYPES",
    "PrecisionPolicy",
    "ProbeResult",
    "TypeReport",
    "change_compute",
    "open_device",
    "prepare",
    "probe",
    "slowness",
    "tf32",
    "torch_dtype",
    "usable",
]
