"""What is shipped with the package: the learned toy world. `halfstep.recipes` makes it anew.

autoencoder/: of diffusers' class AutoencoderTiny, `--autoencoder toy`
cdit/:        a CDiT that walks through the playground, starts.npz with frames to begin from
eqm/:         a video EqM of clips from there
Each folder has facts.json: how it was made and how good it is. Networks have train.yaml, by which they were trained.
"""

from importlib.resources import files
from pathlib import Path


def shipped(name: str) -> Path:
    """The folder of that name."""
    return Path(str(files(__name__) / name))
