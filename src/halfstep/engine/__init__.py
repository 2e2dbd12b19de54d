"""Many items through a device: in order, bounded, and with nothing lost from the books. Knows no payload."""

from halfstep.engine.crew import Crew, RayCrew, TeamCrew
from halfstep.engine.flow import Flow, Stage
from halfstep.engine.gate import Checked, Gate
from halfstep.engine.lanes import Lanes, lane_count
from halfstep.engine.ledger import Ledger
from halfstep.engine.queue import ByteQueue, Closed
from halfstep.engine.remote import RemoteError, remote_functions
from halfstep.engine.stop import StopRequest, stop_request
from halfstep.engine.transfer import HostCopy, Ring

__all__ = [
    "ByteQueue",
    "Checked",
    "Closed",
    "Crew",
    "Flow",
    "Gate",
    "HostCopy",
    "Lanes",
    "Ledger",
    "RayCrew",
    "RemoteError",
    "Ring",
    "Stage",
    "StopRequest",
    "TeamCrew",
    "lane_count",
    "remote_functions",
    "stop_request",
]
