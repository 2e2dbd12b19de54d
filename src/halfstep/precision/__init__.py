"""Choose a precision in one place, measure whether the device has it, apply it to a module."""

from halfstep.precision.apply import change_compute, prepare
from halfstep.precision.cast import cast, cast_to, map_tensors
from halfstep.precision.choose import Settled, choose, resolve, settle
from halfstep.precision.policy import PRESETS, STORAGE_TYPES, PrecisionPolicy, torch_dtype
from halfstep.precision.probe import ProbeResult, TypeReport, probe, tf32

__all__ = [
    "PRESETS",
    "STORAGE_TYPES",
    "PrecisionPolicy",
    "ProbeResult",
    "Settled",
    "TypeReport",
    "cast",
    "cast_to",
    "change_compute",
    "choose",
    "map_tensors",
    "prepare",
    "probe",
    "resolve",
    "settle",
    "tf32",
    "torch_dtype",
]
