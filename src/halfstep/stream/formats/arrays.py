"""Events from the named arrays of a message (npz, HDF5), and such arrays from events."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np

from halfstep.errors import InputError, printable, some
from halfstep.stream.events import Array, Event, Fact, Identity, Message, MessageError
from halfstep.stream.formats.base import Fields, data_type, native, shown

HC_EV_ANGSTROM = 12398.419843320026  # Planck's constant times the speed of light
_FACT_BYTES = 1 << 20  # most bytes of what is not the data: one value an event
_TEXT_CHARACTERS = 1000  # most characters of a fact

Read = Callable[[str, int], Array | None]  # (key, most bytes) -> the array there; None when the key is not there


def energy_of(energy: Fact | None, wavelength: Fact | None) -> float | None:
    """eV of a photon: the energy that was sent, else that of the wavelength, in metres below 1e-6 and in Angstrom
    otherwise. None where neither is a number above 0: producers send 0 for unknown."""
    if isinstance(energy, int | float) and 0 < energy < math.inf:
        return float(energy)
    if not isinstance(wavelength, int | float) or not 0 < wavelength < math.inf:
        return None
    found = HC_EV_ANGSTROM / (wavelength * 1e10 if wavelength < 1e-6 else wavelength)
    return found if found < math.inf else None


def fact(value: object) -> Fact | None:
    """A value of a message as a Python number or text. None for those that lclstreamer fills in where it has none (NaN,
    -999 and "None"), for long texts, and for what is neither."""
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, bytes):
        value = value.rstrip(b"\0 ").decode()
    if isinstance(value, str):
        return printable(value) if value != "None" and len(value) <= _TEXT_CHARACTERS else None
    if isinstance(value, float):
        return None if math.isnan(value) else value
    if isinstance(value, int):
        return None if value == -999 else int(value)
    return None


def names_of(timestamps: Sequence[Fact | None]) -> list[str]:
    """The name of each event of a message: its timestamp, "" without one. Equal ones within a message get .0, .1, ...
    in their order among themselves: a message that is sent again names them the same, whatever else is in it."""
    texts = ["" if value is None else value if isinstance(value, str) else repr(value) for value in timestamps]
    count, seen = Counter(texts), Counter[str]()
    names = []
    for text in texts:
        names.append(text if count[text] == 1 or not text else f"{text}.{seen[text]}")
        seen[text] += 1
    return names


def events_shape(shape: tuple[int, ...], original: Sequence[int] | None, stamps: int | None) -> tuple[int, ...]:
    """(B, C, H, W) of data that was sent as (H, W), (B, H, W), (B, C, H, W) or, panels merged into the batch,
    (B*C, 1, H, W). `original` is the (B, C, h, w) that was sent with it, h and w from before padding: merged panels
    are known by it alone. (N, H, W) is one event of N panels when it came with a single one of `stamps`."""
    if len(shape) not in (2, 3, 4):
        raise MessageError(f"data: shape {shape}, expected (H, W), (B, H, W) or (B, C, H, W)")
    *outer, height, width = shape
    count = math.prod(outer)
    if original is None:
        alone = len(shape) == 3 and stamps == 1
        return (*((1, count) if alone else (count, 1) if len(shape) < 4 else outer), height, width)
    if len(original) != 4 or min(original) < 1:
        raise MessageError(f"original_shape: {shown(list(original))}, expected sizes (B, C, H, W)")
    batch, panels = original[:2]
    if tuple(outer) not in {(batch, panels), (batch * panels, 1)} and (len(outer) == 2 or count != batch * panels):
        raise MessageError(f"data: shape {shape} does not fit the original shape {tuple(original)}")
    if original[2] > height or original[3] > width:
        raise MessageError(f"data: shape {shape} is smaller than the original shape {tuple(original)}")
    return batch, panels, height, width


def message_of(fields: Fields, read: Read, there: Callable[[], Sequence[str]]) -> Message:
    """The events of a message whose arrays `read` gives; `there` names what it holds, for errors. `photon_energy_eV` is
    the energy that was sent, else that of the wavelength. Of the `others`, those with one value an event, or one for
    all, become facts. Raises `MessageError` when they do not fit together."""
    found: dict[str, Array] = {}
    for name, keys in fields.keys().items():
        for key in keys:
            array = read(key, fields.largest_bytes if name == "data" else _FACT_BYTES)
            if array is not None:
                found[name] = array
                break
    for name in sorted(fields.required - found.keys()):
        under = " or ".join(fields.keys().get(name, (name,)))
        raise MessageError(f"{name} is not there under {under}; it holds {some(there(), 10)}: set fields.{name}")
    data, original, stamps = found.pop("data"), found.pop("original_shape", None), found.get("timestamp")
    data_type("data", data.dtype)
    if original is not None and (original.dtype.kind not in "ui" or original.ndim != 1):
        raise MessageError(f"original_shape: {shown(original.dtype.str)} {original.shape}, expected four whole numbers")
    sizes = None if original is None else [int(size) for size in original[:5]]
    shape = events_shape(data.shape, sizes, None if stamps is None else stamps.size)
    columns = {name: _column(name, array, shape[0]) for name, array in found.items()}
    missing: list[Fact | None] = [None] * shape[0]
    energies, wavelengths = (columns.pop(name, missing) for name in ("photon_energy", "photon_wavelength"))
    names = names_of(columns.get("timestamp", missing))
    events = []
    for place, (name, pixels) in enumerate(zip(names, native(data).reshape(shape), strict=True)):
        facts = {key: value for key, column in columns.items() if (value := column[place]) is not None}
        if energy := energy_of(energies[place], wavelengths[place]):
            facts["photon_energy_eV"] = energy
        events.append(Event(Identity("", "", name), pixels, facts))
    return Message(tuple(events))


def _column(name: str, array: Array, events: int) -> list[Fact | None]:
    if name in ("photon_energy", "photon_wavelength") and array.dtype.kind not in "uif":
        raise MessageError(f"{name}: type {shown(array.dtype.str)}, expected a number")
    if array.size == 1:
        return [fact(array.reshape(-1)[0])] * events
    if array.size == events:
        return [fact(value) for value in array.reshape(-1)]
    if name in Fields().keys():
        raise MessageError(
            f"{events} events but {array.size} values of {name}, expected one an event; "
            "panels that are merged into the batch are known by original_shape alone"
        )
    return [None] * events


def arrays_of(events: Sequence[Event]) -> dict[str, Array]:
    """The arrays by our names, as lclstreamer batches them: `data` [B, C, H, W], `original_shape` [4], and `timestamp`
    [B] and `photon_wavelength` [B] in Angstrom where every event has them. Raises `InputError` when they do not fit."""
    if len({(event.data.shape, event.data.dtype) for event in events}) != 1 or events[0].data.ndim != 3:
        raise InputError("a message takes one or more events [C, H, W] of one shape and type")
    data = np.stack([event.data for event in events])
    arrays = {"data": data, "original_shape": np.array(data.shape, np.int32)}
    if all("timestamp" in event.facts for event in events):
        stamps = [event.facts["timestamp"] for event in events]
        arrays["timestamp"] = np.array(stamps, np.uint64 if isinstance(stamps[0], int) else None)
    if all("photon_energy_eV" in event.facts for event in events):
        energies = np.array([event.facts["photon_energy_eV"] for event in events], np.float64)
        arrays["photon_wavelength"] = HC_EV_ANGSTROM / energies
    return arrays
