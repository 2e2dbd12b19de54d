"""lclstreamer's Simplon serializer, which is not DECTRIS' stream: a CBOR map per message, in three forms over time.
First with a byte `c` or `m` before it, `run` or `run_number`, `dtype` and `compressed_data`; then without the byte,
with `run_id` and `image_dtype`; now with the bytes as they are in `data`. `compressed_data` is bitshuffled lz4 in
blocks of 4096 elements, without a header. An image does not tell its shape: the start does, which reaches one of
several clients."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from typing import Any

import cbor2
import hdf5plugin
import numpy as np

from halfstep.errors import InputError
from halfstep.stream.events import Array, Event, Fact, Identity, Message, MessageError
from halfstep.stream.formats.arrays import energy_of, fact
from halfstep.stream.formats.base import DATA_TYPES, Fields, refusing, shown, sized, view_of
from halfstep.stream.formats.cbor import facts_of, name_of, read_map
from halfstep.stream.formats.compression import compressed, unbitshuffle

SOURCE = "simplon"
_BLOCK_ELEMENTS = 4096
_HEADER = struct.Struct(">QI")  # what HDF5's bitshuffle has before its blocks: bytes in all, bytes of a block
_RUNS = ("run_id", "run", "run_number")
_TYPES = ("image_dtype", "dtype")


def decode(message: bytes | memoryview, fields: Fields) -> Message:
    """A start, an image or an end (in the first form `stop`). `fields.shape` is the shape of an image: from the user,
    or from a start by `fields.after`. `data` is a view of the message where it is sent as it is.

    An event is named by its timestamp, and by its `message_id` without one: that number is 10000 times the sender's
    rank and a count that runs into the next rank's, so it is a fact and no `sequence`. `photon_energy_eV` is the energy
    that was sent, else that of the wavelength in Angstrom; the first form sent the electrons' energy in MeV under that
    name, which stays the fact `photon_energy`. Raises `MessageError`."""
    with refusing("Simplon message"):
        view = view_of(message)
        prefixed = view[0] in b"cm"
        content = read_map(view[1:] if prefixed else view)
        kind = content.get("type")
        if kind not in ("start", "image", "end", "stop"):
            raise MessageError(f"type {shown(kind)}, expected start, image or end")
        run = name_of(content, _RUNS)
        facts = facts_of(content, ("type", *_RUNS, *_TYPES))
        if kind != "image":
            return Message(run=run, source=SOURCE, starts=kind == "start", ends=kind != "start", facts=facts)
        sent, wavelength = (facts.get("photon_energy"), facts.pop("photon_wavelength", None))
        if energy := energy_of(None if prefixed else sent, wavelength):
            facts["photon_energy_eV"] = energy
        if not prefixed:
            facts.pop("photon_energy", None)
        name = next((str(facts[key]) for key in ("timestamp", "message_id") if key in facts), "")
        if isinstance(stamp := facts.get("timestamp"), str):
            facts["timestamp"] = _number(stamp)
        data = _image(content, fields)
        return Message((Event(Identity(run, SOURCE, name), data, facts),), run=run, source=SOURCE)


def encode_start(run: str, data: Array, facts: Mapping[str, Fact] | None = None) -> bytes:
    """The start of a run whose images are such as `data` [C, H, W], in the first form."""
    named = {"type": "start", "run_number": run, "datatype": str(data.dtype), "shape": "x".join(map(str, data.shape))}
    return b"c" + cbor2.dumps({**named, "algorithm": "bitshuffle-lz4", **(facts or {})})


def encode_image(run: str, message_id: int, data: Array, facts: Mapping[str, Fact] | None = None) -> bytes:
    """An image [C, H, W] in the first form. `facts` are by lclstreamer's names. Raises `InputError`."""
    if data.dtype.name not in DATA_TYPES or not data.dtype.isnative or data.ndim != 3:
        raise InputError(
            f"image {data.shape} {data.dtype}: expected [C, H, W] of one of {', '.join(sorted(DATA_TYPES))}"
        )
    bits = np.ascontiguousarray(data).reshape(-1).view(f"u{data.itemsize}")
    packed = compressed(bits, hdf5plugin.Bitshuffle(nelems=_BLOCK_ELEMENTS, cname="lz4"))[_HEADER.size :]
    named = {"type": "image", "run": run, "compressed_data": packed, "dtype": str(data.dtype), "message_id": message_id}
    return b"m" + cbor2.dumps({**named, **(facts or {})})


def encode_end(run: str) -> bytes:
    """The end of a run, in the first form."""
    return b"c" + cbor2.dumps({"type": "stop", "run": run})


def _number(text: str) -> int | float | str:
    """A timestamp that was sent as a text, as the number it is."""
    if text.isascii() and text.isdecimal() and len(text) <= 20:
        return int(text)
    try:
        number = fact(float(text))
    except ValueError:
        return text
    return text if number is None else number


def _image(content: Mapping[str, Any], fields: Fields) -> Array:
    """[C, H, W] of an image."""
    name = next((content[key] for key in _TYPES if key in content), None)
    if not isinstance(name, str) or name not in DATA_TYPES:
        raise MessageError(f"type {shown(name)}, expected one of {', '.join(sorted(DATA_TYPES))}")
    if fields.shape is None:
        raise MessageError("an image does not tell its shape, and no start has come: set the shape of the data")
    dtype, shape = np.dtype(name), (1, *fields.shape)[-3:]
    size = sized("data", shape, dtype.itemsize, fields.largest_bytes)
    if isinstance(raw := content.get("data"), memoryview):
        if len(raw) != size:
            raise MessageError(f"data: {len(raw)} bytes, expected {size} for shape {shape} of {dtype}")
        return np.frombuffer(raw, dtype).reshape(shape)
    if not isinstance(raw := content.get("compressed_data"), memoryview):
        raise MessageError(f"an image without data or compressed_data; it holds {shown(list(content))}")
    out: Array = np.empty(shape, dtype)
    framed = _HEADER.pack(size, _BLOCK_ELEMENTS * dtype.itemsize) + raw
    unbitshuffle("compressed_data", memoryview(framed), out, dtype.itemsize)
    return out
