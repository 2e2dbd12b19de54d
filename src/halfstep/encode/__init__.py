"""Encode sources into a DatasetStore."""

from halfstep.encode.job import EncodeOptions
from halfstep.encode.runner import EncodeReport, encode
from halfstep.verbs import make_callable

__all__ = ["EncodeOptions", "EncodeReport", "encode"]

make_callable(__name__)
