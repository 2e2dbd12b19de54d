"""Latents of generative models, in the smallest number format that is measured to be enough."""

from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from halfstep.precision import PrecisionPolicy

__version__ = version("halfstep")
__all__ = ["PrecisionPolicy", "__version__"]


def __getattr__(name: str) -> Any:
    # Loaded on first use: importing torch takes seconds, and `halfstep --help` must not.
    if name == "PrecisionPolicy":
        from halfstep.precision import PrecisionPolicy

        return PrecisionPolicy
    raise AttributeError(f"module 'halfstep' has no attribute {name!r}")
