"""Sampling, and the recording of every step of it."""

from halfstep.sampling.diffusers_hook import record
from halfstep.sampling.eqm import sample_eqm
from halfstep.sampling.recorder import MemoryRecorder, NullRecorder, Recorder, Step, StoreRecorder

__all__ = ["MemoryRecorder", "NullRecorder", "Recorder", "Step", "StoreRecorder", "record", "sample_eqm"]
