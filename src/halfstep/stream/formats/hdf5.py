"""lclstreamer's HDF5 messages: a file in each. The library reads what describes the arrays; their bytes are taken from
the message here, as a view or through checked decoders. What leads out of the message is refused before it is read."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

import h5py
import hdf5plugin
import numpy as np

from halfstep.errors import InputError
from halfstep.stream.events import Array, Event, Message, MessageError
from halfstep.stream.formats.arrays import arrays_of, message_of
from halfstep.stream.formats.base import Fields, Viewed, plain, refusing, shown, sized, view_of
from halfstep.stream.formats.compression import inflate, unbitshuffle, unshuffle, unzfp

_SIGNATURE = b"\x89HDF\r\n\x1a\n"
_METADATA_BYTES = 1 << 26  # most bytes of one read by the library
_MOST_CHUNKS = 100_000
_MOST_NAMES = 20  # of those that an error lists
_SHUFFLE, _DEFLATE = h5py.h5z.FILTER_SHUFFLE, h5py.h5z.FILTER_DEFLATE
_BITSHUFFLE, _ZFP = hdf5plugin.Bitshuffle.filter_id, hdf5plugin.Zfp.filter_id
_CODECS = {2: "lz4", 3: "zstd"}  # of bitshuffle
_COMPRESSIONS: dict[str | None, dict[str, Any]] = {
    None: {},
    "gzip": {"compression": "gzip", "compression_opts": 3},
    "bslz4": dict(hdf5plugin.Bitshuffle(cname="lz4")),
    "bszstd": dict(hdf5plugin.Bitshuffle(cname="zstd")),
    "zfp": dict(hdf5plugin.Zfp()),
}


def decode(message: bytes | memoryview, fields: Fields) -> Message:
    """The events of a message. `data` of an event is a view of the message where its bytes lie there plainly, in one
    piece and in native order. Filters that are understood: gzip, byte shuffle, bitshuffle with lz4 or zstd, ZFP.
    Refused: links that are not hard ones, virtual datasets, external storage, types that are not plain numbers.
    Raises `MessageError`."""
    with refusing("HDF5 message"):
        view = view_of(message)
        if view[:8] != _SIGNATURE:
            raise MessageError(f"it begins with {bytes(view[:8])!r}, expected {_SIGNATURE!r}")
        with h5py.File(Viewed(view, _METADATA_BYTES), "r") as file:

            def read(key: str, most: int) -> Array | None:
                dataset = _found(file, key)
                return None if dataset is None else _array(key, view, dataset, most)

            return message_of(fields, read, lambda: _names(file))


def encode(events: Sequence[Event], paths: Mapping[str, str], compression: str | None = None) -> bytes:
    """What lclstreamer's serializer sends of `events` [C, H, W], which share shape and type: a chunk an event. `paths`
    say where to put `data` and, where the events have them, `timestamp` and `photon_wavelength` in Angstrom.
    `compression`: one of gzip, bslz4, bszstd, zfp (not lossless). Raises `InputError`."""
    if compression not in _COMPRESSIONS:
        raise InputError(f"compression {compression!r}: expected one of {', '.join(filter(None, _COMPRESSIONS))}")
    arrays = arrays_of(events)
    if missing := [name for name in ("data", *paths) if name not in arrays or name not in paths]:
        raise InputError(f"paths.{missing[0]}: expected data, and names of what every event has: {', '.join(arrays)}")
    content = io.BytesIO()
    with h5py.File(content, "w") as file:
        for name, path in paths.items():
            array = arrays[name]
            options = _COMPRESSIONS[compression] if name == "data" else {}
            file.create_dataset(path, data=array, chunks=(1, *array.shape[1:]), **options)
    return content.getvalue()


def _found(file: h5py.File, path: str) -> h5py.Dataset | None:
    """The dataset at `path`, along hard links; None where there is none. Nothing but the path is looked at."""
    here: Any = file
    for part in filter(None, path.split("/")):
        if not isinstance(here, h5py.Group) or not here.id.links.exists(part.encode()):
            return None
        if here.id.links.get_info(part.encode()).type != h5py.h5l.TYPE_HARD:
            raise MessageError(
                f"{path}: {part!r} is a soft or external link, which may lead out of the message: refused"
            )
        here = here[part]
    return here if isinstance(here, h5py.Dataset) else None


def _names(file: h5py.File) -> list[str]:
    names: list[str] = []

    def note(name: bytes) -> bool | None:
        names.append(shown(name.decode(errors="replace")))
        return True if len(names) == _MOST_NAMES else None

    file.id.links.visit(note)  # along hard links
    return names


def _array(key: str, view: memoryview, dataset: h5py.Dataset, most: int) -> Array:
    layout = dataset.id.get_create_plist().get_layout()  # before the shape, which a virtual dataset looks up elsewhere
    if layout == h5py.h5d.VIRTUAL or dataset.id.get_create_plist().get_external_count():
        raise MessageError(f"{key}: its data is in other files (virtual or external storage): refused")
    dtype, shape = _type(key, dataset), dataset.shape
    if shape is None:
        raise MessageError(f"{key}: it has no shape")
    size = sized(key, shape, dtype.itemsize, most)
    if layout == h5py.h5d.CHUNKED:
        return _chunked(key, view, dataset, dtype, most)
    if layout == h5py.h5d.COMPACT:
        return np.asarray(dataset[()], dtype)
    offset = dataset.id.get_offset()
    if offset is None or dataset.id.get_storage_size() != size:
        raise MessageError(f"{key}: {dataset.id.get_storage_size()} bytes are stored, expected {size}")
    return np.frombuffer(_piece(key, view, offset, size), dtype).reshape(shape)


def _type(key: str, dataset: h5py.Dataset) -> np.dtype[Any]:
    """The numpy type that the stored bytes have as they are."""
    stored = dataset.id.get_type()
    kind = stored.get_class()
    dtype: np.dtype[Any] = stored.dtype
    if kind not in (h5py.h5t.INTEGER, h5py.h5t.FLOAT, h5py.h5t.STRING) or dtype.hasobject:
        raise MessageError(f"{key}: type {shown(str(dtype))} of class {kind}, expected plain numbers")
    plain(key, dtype)
    if kind != h5py.h5t.STRING and stored != h5py.h5t.py_create(dtype):
        raise MessageError(f"{key}: a number format that numpy has not, nearest to {dtype}")
    return dtype


def _piece(key: str, view: memoryview, offset: int, size: int) -> memoryview:
    piece = view[offset : offset + size]
    if len(piece) != size:
        raise MessageError(f"{key}: bytes {offset} to {offset + size} of a message of {len(view)}: it is cut short")
    return piece


def _chunked(key: str, view: memoryview, dataset: h5py.Dataset, dtype: np.dtype[Any], most: int) -> Array:
    shape, chunk = dataset.shape, dataset.chunks
    grid = [-(-size // step) for size, step in zip(shape, chunk, strict=True)]
    sized(key, (math.prod(grid), *chunk), dtype.itemsize, 2 * most)  # what decoding makes, beyond the edges too
    stored: dict[tuple[int, ...], Any] = {}

    def note(info: Any) -> bool | None:
        stored[info.chunk_offset] = info
        return True if len(stored) > _MOST_CHUNKS else None

    dataset.id.chunk_iter(note)
    expected = math.prod(grid)
    if expected > _MOST_CHUNKS or len(stored) != expected:
        raise MessageError(f"{key}: {len(stored)} chunks are there, expected {expected}, {_MOST_CHUNKS} at most")
    filters = _filters(key, dataset)
    if not filters and grid == [1] * len(grid) and chunk == shape:
        info = stored[(0,) * len(shape)]
        return np.frombuffer(_piece(key, view, info.byte_offset, info.size), dtype).reshape(shape)
    out: Array = np.empty(shape, dtype)
    for offset, info in stored.items():
        if any(at % step or at >= size for at, step, size in zip(offset, chunk, shape, strict=True)):
            raise MessageError(f"{key}: a chunk at {offset} of shape {shape} in chunks of {chunk}")
        raw = _piece(key, view, info.byte_offset, info.size)
        used = [each for place, each in enumerate(filters) if not info.filter_mask >> place & 1]
        part = out[tuple(slice(at, at + step) for at, step in zip(offset, chunk, strict=True))]
        if part.shape == chunk and part.flags.c_contiguous:
            _decode_chunk(key, raw, used, part)
        else:
            whole: Array = np.empty(chunk, dtype)
            _decode_chunk(key, raw, used, whole)
            part[...] = whole[tuple(map(slice, part.shape))]
    return out


def _decode_chunk(key: str, raw: memoryview, filters: list[tuple[int, tuple[int, ...]]], out: Array) -> None:
    """Undoes `filters`, the last first, into `out` of the chunk's shape, contiguous."""
    if filters and filters[-1][0] != _SHUFFLE:
        (number, values), filters = filters[-1], filters[:-1]
        if number == _ZFP and not filters:
            unzfp(key, raw, out, values)
            return
        if number == _BITSHUFFLE and not filters:
            if len(values) < 5 or values[4] not in _CODECS or values[2] != out.itemsize:
                raise MessageError(f"{key}: bitshuffle with values {values}, expected lz4 or zstd of its own type")
            unbitshuffle(key, raw, out, out.itemsize, _CODECS[values[4]])
            return
        if number != _DEFLATE:
            raise MessageError(f"{key}: byte shuffle before filter {number}, expected it before gzip alone")
        raw = inflate(key, raw, out.nbytes)
    if len(raw) != out.nbytes:
        raise MessageError(f"{key}: a chunk of {len(raw)} bytes, expected {out.nbytes}")
    for _, values in filters:
        if values != (out.itemsize,):
            raise MessageError(f"{key}: shuffled in elements of {values} bytes, expected {out.itemsize}")
        raw = unshuffle(raw, out.itemsize)
    out.reshape(-1).view(np.uint8)[:] = np.frombuffer(raw, np.uint8)


def _filters(key: str, dataset: h5py.Dataset) -> list[tuple[int, tuple[int, ...]]]:
    """(number, values) of the dataset's filters: byte shuffles, then at most one compression."""
    listed = dataset.id.get_create_plist()
    filters = []
    for place in range(listed.get_nfilters()):
        number, _, values, name = listed.get_filter(place)
        if number not in (_SHUFFLE, _DEFLATE, _BITSHUFFLE, _ZFP):
            raise MessageError(
                f"{key}: filter {number} ({shown(name.decode(errors='replace'))}), "
                "expected gzip, shuffle, bitshuffle with lz4 or zstd, or ZFP"
            )
        filters.append((number, values))
    if any(number != _SHUFFLE for number, _ in filters[:-1]):
        raise MessageError(f"{key}: {len(filters)} filters on one another, expected shuffle and one compression")
    return filters
