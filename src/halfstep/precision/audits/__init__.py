"""Which numbers of a module may be half: found on any machine, by simulating the arithmetic of the target."""

from halfstep.precision.audits.audit import AuditReport, Finding, audit
from halfstep.precision.audits.gradients import GradientReport, audit_gradients
from halfstep.precision.audits.rescale import Rescaling, rescale
from halfstep.precision.audits.spread import Range
from halfstep.precision.audits.trace import Event

__all__ = [
    "AuditReport",
    "Event",
    "Finding",
    "GradientReport",
    "Range",
    "Rescaling",
    "audit",
    "audit_gradients",
    "rescale",
]
