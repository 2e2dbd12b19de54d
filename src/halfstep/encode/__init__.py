"""Encode sources into a DatasetStore."""

from halfstep.encode.job import EncodeOptions
from halfstep.encode.runner import EncodeReport, encode

__all__ = ["EncodeOptions", "EncodeReport", "encode"]
