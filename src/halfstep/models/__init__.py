"""Networks over latents, and PeakNet over detector frames, loading the published state dicts as they are."""

from halfstep.models.cdit import CDIT_SIZES, CDiT
from halfstep.models.eqm import EQM_SIZES, EqM
from halfstep.models.family import Family, Network
from halfstep.models.livestream import LIVESTREAM_SIZES, LiveStream
from halfstep.models.livestream_load import LiveStreamLoad
from halfstep.models.peaknet import PeakNet
from halfstep.models.registry import FAMILIES, family_of
from halfstep.models.weights import About, Checkpoint, read_checkpoint

__all__ = [
    "CDIT_SIZES",
    "EQM_SIZES",
    "FAMILIES",
    "LIVESTREAM_SIZES",
    "About",
    "CDiT",
    "Checkpoint",
    "EqM",
    "Family",
    "LiveStream",
    "LiveStreamLoad",
    "Network",
    "PeakNet",
    "family_of",
    "read_checkpoint",
]
