"""The formats in which producers send events: bytes to `Message` and back. A message that cannot be used raises
`MessageError`, whatever is in it."""

from collections.abc import Callable

from halfstep.stream.events import Message
from halfstep.stream.formats import dectris, hdf5, npz, simplon
from halfstep.stream.formats.base import Fields

__all__ = ["FORMATS", "Fields"]

# The formats by the names that a user gives them.
FORMATS: dict[str, Callable[[bytes | memoryview, Fields], Message]] = {
    "npz": npz.decode,
    "hdf5": hdf5.decode,
    "dectris": dectris.decode,
    "simplon": simplon.decode,
}
