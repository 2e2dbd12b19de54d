"""Networks over latents, loading the published state dicts as they are."""

from halfstep.models.cdit import CDIT_SIZES, CDiT
from halfstep.models.eqm import EQM_SIZES, EqM
from halfstep.models.weights import About, Checkpoint, Network, read_checkpoint

__all__ = ["CDIT_SIZES", "EQM_SIZES", "About", "CDiT", "Checkpoint", "EqM", "Network", "read_checkpoint"]
