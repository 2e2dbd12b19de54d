"""Encode sources into a DatasetStore."""

from halfstep.encode.job import EncodeOptions
from halfstep.encode.runner import EncodeReport, Progress, encode

__all__ = ["EncodeOptions", "EncodeReport", "Progress", "encode"]
