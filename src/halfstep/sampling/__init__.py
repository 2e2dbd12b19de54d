"""Sampling, and the recording of every step of it."""

from halfstep.sampling.cdit import rollout, sample_cdit
from halfstep.sampling.diffusers_hook import record
from halfstep.sampling.eqm import energy_score, sample_eqm, sample_eqm_ode
from halfstep.sampling.recorder import MemoryRecorder, NullRecorder, Recorder, Step, StoreRecorder

__all__ = [
    "MemoryRecorder",
    "NullRecorder",
    "Recorder",
    "Step",
    "StoreRecorder",
    "energy_score",
    "record",
    "rollout",
    "sample_cdit",
    "sample_eqm",
    "sample_eqm_ode",
]
