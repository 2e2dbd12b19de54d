"""Messages to live consumers, in MessagePack."""

from __future__ import annotations

import math
from typing import Any

import msgpack
import numpy as np

from halfstep.stream.events import Array, Fact, Result
from halfstep.stream.sinks.cxi import slab_places
from halfstep.stream.sinks.facts import photon_energy

MESSAGE_VERSION = 1


def result_message(result: Result) -> bytes:
    """One map: `version` 1; `run`, `source`, `event`, `sequence`; `facts`, a map; and the arrays `data` [C, H, W],
    `peaks` [P, 3] (panel, y, x), `intensities` [P], `mask` [C, H, W] or nil. An array is a map of `type` (NumPy's, as
    "<u2"), `shape` and `data`, its bytes in C order."""
    event = result.event
    content = {
        "version": MESSAGE_VERSION,
        **event.identity._asdict(),
        "facts": {name: _plain(value) for name, value in event.facts.items()},
        "data": _array(event.data),
        "peaks": _array(result.peaks),
        "intensities": _array(result.intensities),
        "mask": None if result.mask is None else _array(result.mask),
    }
    return _bytes_of(content)


def crystfel_message(hit: Result) -> bytes:
    """What indexamajig takes with `--data-format=msgpack --peaks=msgpack`: `detector_data` and `peak_list` of all
    panels one below the other; and, to be named as headers in a geometry, `photon_energy_eV` (NaN where it is not
    known), `run`, `source`, `event`, `sequence`, and the facts by their names. One that begins like another key is left
    out: CrystFEL would take it for that."""
    event = hit.event
    panels, height, width = event.data.shape
    # CrystFEL takes these two types and makes floats of both: whole numbers that int32 has stay whole until then.
    kind = "<i4" if np.can_cast(event.data.dtype, np.int32) else "<f4"
    x, y = slab_places(hit.peaks, height)
    # As floats of 64 bits, whatever they are: CrystFEL reads the bytes of one without asking for the type.
    peaks = {"fs": x, "ss": y, "intensity": hit.intensities}
    energy = photon_energy(event.facts)
    content: dict[str, Any] = {
        "detector_data": _array(event.data.reshape(panels * height, width).astype(kind)),
        "peak_list": {name: values.astype(np.float64).tolist() for name, values in peaks.items()},
        "photon_energy_eV": math.nan if energy is None else energy,
        **event.identity._asdict(),
    }
    for name, value in sorted(event.facts.items()):
        if not any(name.startswith(key) or key.startswith(name) for key in content):
            content[name] = _plain(value)
    return _bytes_of(content)


def _array(values: Array) -> dict[str, Any]:
    return {"type": values.dtype.str, "shape": list(values.shape), "data": values.tobytes()}


def _plain(value: Fact) -> Fact:
    """MessagePack's whole numbers have 64 bits; what is larger is sent as text."""
    return str(value) if isinstance(value, int) and not -(1 << 63) <= value < 1 << 64 else value


def _bytes_of(content: dict[str, Any]) -> bytes:
    packed: bytes = msgpack.packb(content, unicode_errors="backslashreplace")
    return packed
