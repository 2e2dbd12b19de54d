"""Live worlds: a frame model stepped by keys or by a camera, in a precision that is changed while it runs."""

from halfstep.live.engine import LiveEngine, LiveFrame
from halfstep.live.frames import STILL, Action, FrameModel, FrameSpec, Made
from halfstep.live.walks import Walk, WalkModel

__all__ = [
    "STILL",
    "Action",
    "FrameModel",
    "FrameSpec",
    "LiveEngine",
    "LiveFrame",
    "Made",
    "Walk",
    "WalkModel",
]
