"""Latents of generative models, in the smallest number format that is measured to be enough."""

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from halfstep.analyze import analyze as analyze
    from halfstep.autoencoders import load_autoencoder as load_autoencoder
    from halfstep.encode import encode as encode
    from halfstep.models import read_checkpoint as read_checkpoint
    from halfstep.precision import PrecisionPolicy as PrecisionPolicy
    from halfstep.precision import prepare as prepare
    from halfstep.precision import probe as probe
    from halfstep.sample import sample as sample
    from halfstep.sampling import record as record
    from halfstep.store import DatasetStore as DatasetStore
    from halfstep.store import TrajectoryStore as TrajectoryStore
    from halfstep.store import open_trajectories as open_trajectories
    from halfstep.train import train as train

__version__ = version("halfstep")

# The public names and where they are. They are loaded on first use: importing torch takes seconds, and those who only
# read stores do without it.
_PUBLIC = {
    "DatasetStore": "halfstep.store",
    "PrecisionPolicy": "halfstep.precision",
    "TrajectoryStore": "halfstep.store",
    "analyze": "halfstep.analyze",
    "encode": "halfstep.encode",
    "load_autoencoder": "halfstep.autoencoders",
    "open_trajectories": "halfstep.store",
    "prepare": "halfstep.precision",
    "probe": "halfstep.precision",
    "read_checkpoint": "halfstep.models",
    "record": "halfstep.sampling",
    "sample": "halfstep.sample",
    "train": "halfstep.train",
}
__all__ = [*_PUBLIC, "__version__"]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'halfstep' has no attribute {name!r}")
    try:
        module = import_module(_PUBLIC[name])
    except ImportError as error:
        from halfstep.extras import missing

        raise missing(error, name) or error from error
    # A package of the function's own name can be called: see halfstep.verbs.
    return module if module.__name__ == f"halfstep.{name}" else getattr(module, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
