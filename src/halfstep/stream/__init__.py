"""Detector frames, or those of any camera, through a network as they come: every frame in, every result out."""

from halfstep.stream.engine import StreamEngine, StreamOptions, StreamReport
from halfstep.stream.events import Event, Identity, Result
from halfstep.stream.model import ModelSpec
from halfstep.stream.parts import Outputs
from halfstep.stream.peaks import find_peaks, measure_peaks
from halfstep.stream.prepare import Preparation

__all__ = [
    "Event",
    "Identity",
    "ModelSpec",
    "Outputs",
    "Preparation",
    "Result",
    "StreamEngine",
    "StreamOptions",
    "StreamReport",
    "find_peaks",
    "measure_peaks",
]
