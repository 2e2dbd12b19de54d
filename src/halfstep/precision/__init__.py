"""Choose a precision in one place, measure whether the device has it, apply it to a module."""

from halfstep.precision.apply import change_compute, prepare
from halfstep.precision.arithmetic import Target
from halfstep.precision.audits import AuditReport, GradientReport, Rescaling, audit, audit_gradients, rescale
from halfstep.precision.cast import cast, cast_to, map_tensors
from halfstep.precision.choose import Settled, choose, resolve, settle
from halfstep.precision.health import Movement, Stalled, check_autocast, check_scale, check_types, find_failure
from halfstep.precision.policy import PRESETS, STORAGE_TYPES, PrecisionPolicy, torch_dtype
from halfstep.precision.probe import ProbeResult, TypeReport, probe, tf32
from halfstep.precision.scaling import COLLAPSE, LossScale
from halfstep.precision.simulate import SimulatedRun, simulate
from halfstep.precision.trial import Trial, network_trial

__all__ = [
    "COLLAPSE",
    "PRESETS",
    "STORAGE_TYPES",
    "AuditReport",
    "GradientReport",
    "LossScale",
    "Movement",
    "PrecisionPolicy",
    "ProbeResult",
    "Rescaling",
    "Settled",
    "SimulatedRun",
    "Stalled",
    "Target",
    "Trial",
    "TypeReport",
    "audit",
    "audit_gradients",
    "cast",
    "cast_to",
    "change_compute",
    "check_autocast",
    "check_scale",
    "check_types",
    "choose",
    "find_failure",
    "map_tensors",
    "network_trial",
    "prepare",
    "probe",
    "rescale",
    "resolve",
    "settle",
    "simulate",
    "tf32",
    "torch_dtype",
]
