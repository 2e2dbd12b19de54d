"""Sampling, and the recording of every step of it."""

from halfstep.sampling.cdit import Prediction, rollout, sample_cdit
from halfstep.sampling.diffusers_hook import record
from halfstep.sampling.eqm import GuidedField, energy_score, sample_eqm, sample_eqm_ode
from halfstep.sampling.livestream import noise_levels, sample_livestream
from halfstep.sampling.recorder import MemoryRecorder, NullRecorder, Recorder, Step, StoreRecorder
from halfstep.sampling.states import SamplerState, drive

__all__ = [
    "GuidedField",
    "MemoryRecorder",
    "NullRecorder",
    "Prediction",
    "Recorder",
    "SamplerState",
    "Step",
    "StoreRecorder",
    "drive",
    "energy_score",
    "noise_levels",
    "record",
    "rollout",
    "sample_cdit",
    "sample_eqm",
    "sample_eqm_ode",
    "sample_livestream",
]
