"""Does a lower precision make a world model drift? One step, long walks, and controls that must be rejected."""

from halfstep.live.drift.admission import Admission
from halfstep.live.drift.course import Course, Subject
from halfstep.live.drift.measure import Drift, Opened, Settings, measure_drift, opened
from halfstep.live.drift.truth import Truth, store_truth, toy_truth

__all__ = [
    "Admission",
    "Course",
    "Drift",
    "Opened",
    "Settings",
    "Subject",
    "Truth",
    "measure_drift",
    "opened",
    "store_truth",
    "toy_truth",
]
