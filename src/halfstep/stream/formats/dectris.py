"""DECTRIS stream V2: a CBOR map per message (github.com/dectris/documentation, stream_v2). A start and an end reach one
of several clients alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import cbor2
import hdf5plugin
import numpy as np

from halfstep.errors import InputError
from halfstep.stream.events import Array, Event, Fact, Identity, Message, MessageError
from halfstep.stream.formats.arrays import energy_of
from halfstep.stream.formats.base import Fields, data_type, native, refusing, shown, sized, view_of
from halfstep.stream.formats.cbor import Tag, facts_of, name_of, read_map
from halfstep.stream.formats.compression import compressed, unbitshuffle, unlz4

SOURCE = "dectris"
_MULTI_DIMENSIONAL, _COMPRESSED = 40, 56500
_TYPES = {  # RFC 8746, section 2
    64: "|u1",
    65: ">u2",
    66: ">u4",
    68: "|u1",
    69: "<u2",
    70: "<u4",
    72: "|i1",
    73: ">i2",
    74: ">i4",
    77: "<i2",
    78: "<i4",
    80: ">f2",
    81: ">f4",
    82: ">f8",
    84: "<f2",
    85: "<f4",
    86: "<f8",
}
_TAGS = {dtype: tag for tag, dtype in _TYPES.items() if tag != 68}  # 68 is the one that clamps


def decode(message: bytes | memoryview, fields: Fields) -> Message:
    """A start, an image or an end. The channels of an image are the panels of its event, in the order sent; `data` is a
    view of the message for one channel that is not compressed. `facts` of a start are the numbers and texts in it by
    their names, and `photon_energy_eV`; those of an event are its times in seconds and others by their names. Of
    `fields` the limit alone matters. Raises `MessageError`."""
    with refusing("DECTRIS message"):
        content = read_map(view_of(message))
        kind = content.get("type")
        if kind not in ("start", "image", "end"):
            raise MessageError(f"type {shown(kind)}, expected start, image or end")
        run = name_of(content, ("series_unique_id", "series_id"))
        facts = facts_of(content, ("type", "series_unique_id", "image_id"))
        if kind == "end":
            return Message(run=run, source=SOURCE, ends=True, facts=facts)
        if kind == "start":
            if energy := energy_of(facts.get("incident_energy"), facts.get("incident_wavelength")):
                facts["photon_energy_eV"] = energy
            images = facts.get("number_of_images")
            expected = images if isinstance(images, int) and images > 0 else None
            return Message(run=run, source=SOURCE, starts=True, expected=expected, facts=facts)
        image, channels = content.get("image_id"), content.get("data")
        if not isinstance(image, int) or image < 0 or not isinstance(channels, dict) or not channels:
            raise MessageError(f"image_id {shown(image)}, expected a number and the data of its channels")
        data = _panels(channels, fields.largest_bytes)
        identity = Identity(run, SOURCE, str(image), image)
        return Message((Event(identity, data, facts),), run=run, source=SOURCE)


def encode_start(series: str, images: int, facts: Mapping[str, Fact] | None = None) -> bytes:
    """The start of a series of so many images. `facts` are by DECTRIS' names: `incident_energy` in eV, ..."""
    named = {"series_unique_id": series, "number_of_images": images}
    return cbor2.dumps({"type": "start", **named, **(facts or {})})


def encode_image(
    series: str,
    image: int,
    data: Array,
    compression: str | None = "bslz4",
    channels: Sequence[str] | None = None,
    facts: Mapping[str, Any] | None = None,
) -> bytes:
    """An image [C, H, W] of whole numbers or floats, a channel a panel. `compression`: bslz4, lz4 or None. Raises
    `InputError`."""
    if compression not in (None, "bslz4", "lz4") or data.ndim != 3 or data.dtype.str not in _TAGS:
        raise InputError(
            f"image {data.shape} {data.dtype}, compression {compression!r}: expected [C, H, W], bslz4 or lz4"
        )
    names = channels or [f"threshold_{place + 1}" for place in range(len(data))]
    arrays = {
        name: cbor2.CBORTag(_MULTI_DIMENSIONAL, [list(data.shape[1:]), cbor2.CBORTag(_TAGS[data.dtype.str], raw)])
        for name, panel in zip(names, data, strict=True)
        for raw in [_packed(np.ascontiguousarray(panel), compression)]
    }
    named = {"series_unique_id": series, "image_id": image, "data": arrays}
    return cbor2.dumps({"type": "image", **named, **(facts or {})})


def encode_end(series: str) -> bytes:
    """The end of a series."""
    return cbor2.dumps({"type": "end", "series_unique_id": series})


def _packed(panel: Array, compression: str | None) -> Any:
    raw = panel.reshape(-1).view(f"u{panel.itemsize}")
    if compression is None:
        return raw.tobytes()
    if compression == "lz4":
        content = compressed(raw.view(np.uint8), hdf5plugin.LZ4())
        return cbor2.CBORTag(_COMPRESSED, ["lz4", 0, content])
    return cbor2.CBORTag(_COMPRESSED, ["bslz4", panel.itemsize, compressed(raw, hdf5plugin.Bitshuffle(cname="lz4"))])


def _panels(channels: Mapping[str, Any], most: int) -> Array:
    """[C, H, W] of the channels of an image, which share shape and type."""
    sent = {str(name): _sent(str(name), value) for name, value in channels.items()}
    (shape, dtype), *others = {(shape, dtype) for shape, dtype, _ in sent.values()}
    if others:
        raise MessageError(f"its channels {shown(list(sent))} differ in shape or type")
    data_type("data", np.dtype(dtype))
    sized("data", (len(sent), *shape), np.dtype(dtype).itemsize, most)
    (name, (_, _, content)), *_ = sent.items()
    if len(sent) == 1 and not isinstance(content, Tag):
        return native(_plain(name, content, shape, dtype)[None])
    data: Array = np.empty((len(sent), *shape), dtype)
    for panel, (name, (_, _, content)) in zip(data, sent.items(), strict=True):
        match content:
            case Tag(number=56500, value=["bslz4", int(element_bytes), memoryview() as raw]):
                unbitshuffle(name, raw, panel, element_bytes)
            case Tag(number=56500, value=["lz4", _, memoryview() as raw]):
                unlz4(name, raw, panel)
            case _:
                panel[...] = _plain(name, content, shape, dtype)
    return native(data)


def _sent(name: str, value: Any) -> tuple[tuple[int, int], str, Any]:
    """(shape, type, bytes or what they are packed in) of a channel."""
    match value:
        case Tag(number=40, value=[[int(height), int(width)], Tag(number=number, value=content)]) if number in _TYPES:
            return (height, width), _TYPES[number], content
    raise MessageError(f"channel {shown(name)}: not a two-dimensional array of numbers of up to 32 bits, or of float64")


def _plain(name: str, content: Any, shape: tuple[int, int], dtype: str) -> Array:
    if not isinstance(content, memoryview):
        raise MessageError(f"channel {shown(name)}: packed in a way other than bslz4 and lz4")
    size = sized(name, shape, np.dtype(dtype).itemsize, len(content))
    if len(content) != size:
        raise MessageError(f"channel {shown(name)}: {len(content)} bytes, expected {size}")
    return np.frombuffer(content, dtype).reshape(shape)
