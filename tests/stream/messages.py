"""Events and messages of every format to test with."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable

import numpy as np

from halfstep.stream.events import Array, Event, Identity
from halfstep.stream.formats import Fields, dectris, hdf5, npz, simplon

STAMP = 1_700_000_000 << 32
PATHS = {"data": "/data/data", "timestamp": "/data/timestamp", "photon_wavelength": "/data/wavelength"}
TYPES = ("uint8", "uint16", "uint32", "int8", "int16", "int32", "float16", "float32", "float64")


def peak_bytes(work: Callable[[], object]) -> int:
    """The most memory that Python holds while `work` is done again: what it imports the first time does not count."""
    work()
    tracemalloc.start()
    try:
        work()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def pixels(*shape: int, dtype: str = "float32", seed: int = 0) -> Array:
    """Counts such as a detector's, with the largest and smallest of the type among them."""
    counts = np.random.default_rng(seed).poisson(5, shape).astype(dtype)
    kind = np.iinfo(dtype) if counts.dtype.kind in "ui" else np.finfo(dtype)
    counts.reshape(-1)[:2] = [kind.max, kind.min][: counts.size]
    return counts


def some_events(count: int, data: Array | None = None) -> list[Event]:
    """`count` events with all that is known of them."""
    frames = pixels(count, 2, 24, 40) if data is None else data
    return [
        Event(Identity("", "", repr(STAMP + i)), frame, {"timestamp": STAMP + i, "photon_energy_eV": 9500.0})
        for i, frame in enumerate(frames)
    ]


def all_messages() -> dict[str, tuple[str, bytes, Fields]]:
    """Name -> (format, a valid message, the fields to read it by)."""
    events, counts = some_events(2), pixels(2, 24, 40, dtype="uint32")
    fields = Fields(shape=(2, 24, 40), largest_bytes=1 << 26)
    return {
        name: (format_name, message, fields)
        for name, format_name, message in [
            ("npz", "npz", npz.encode(events)),
            ("npz compressed", "npz", npz.encode(events, compressed=True)),
            *((f"hdf5 {c}", "hdf5", hdf5.encode(events, PATHS, c)) for c in (None, "gzip", "bslz4", "bszstd", "zfp")),
            *((f"dectris {c}", "dectris", dectris.encode_image("s", 7, counts, c)) for c in (None, "bslz4", "lz4")),
            ("dectris start", "dectris", dectris.encode_start("s", 10, {"incident_energy": 9500.0})),
            ("dectris end", "dectris", dectris.encode_end("s")),
            ("simplon", "simplon", simplon.encode_image("7", 3, events[0].data, {"timestamp": "1.5"})),
            ("simplon start", "simplon", simplon.encode_start("7", events[0].data)),
        ]
    }
