"""Compressed blocks: their framing is checked here, before a decoder sees it. HDF5's filters trust the lengths they
read: bitshuffle and LZ4 read beyond a block that was cut short, ZFP beyond its stream. After the checks below they
cannot. Nothing here makes more bytes than were asked for."""

from __future__ import annotations

import io
import math
import struct
import zlib
from collections.abc import Mapping
from typing import Any

import h5py
import hdf5plugin
import numpy as np
import pyarrow

from halfstep.stream.events import Array, MessageError

_MOST_BLOCKS = 1 << 22
_MOST_BLOCK_BYTES = (1 << 31) - 1  # the decoders count in int
_ELEMENTS = 8  # bitshuffle transposes this many elements at once and leaves the rest as they are
_HEADER = struct.Struct(">QI")  # decompressed bytes, bytes of a block
_LENGTH = struct.Struct(">I")
_ZFP_TYPES = ("float32", "float64", "int32", "int64")


def inflate(what: str, data: memoryview, size: int, wbits: int = zlib.MAX_WBITS) -> memoryview:
    """The `size` bytes that `data` is deflated from. Raises `MessageError` when they are more or fewer."""
    if size < 1:  # zlib takes 0 for no limit
        raise MessageError(f"{what}: declares {size} bytes")
    stream = zlib.decompressobj(wbits)
    try:
        content = stream.decompress(data, size)
        more = b"" if stream.eof else stream.decompress(stream.unconsumed_tail, 1)
    except zlib.error as error:
        raise MessageError(f"{what}: its deflated bytes are damaged: {error}") from error
    if len(content) != size or more or not stream.eof:
        raise MessageError(f"{what}: inflates to other than the {size} bytes that it declares")
    if stream.unused_data:
        raise MessageError(f"{what}: bytes follow the end of its deflated bytes")
    return memoryview(content)


def unshuffle(data: memoryview, itemsize: int) -> memoryview:
    """Undoes HDF5's byte shuffle: the first bytes of all elements, then the second ones, ..."""
    planes = np.frombuffer(data, np.uint8).reshape(itemsize, -1)
    elements = np.empty(planes.shape[::-1], np.uint8)
    for byte, plane in enumerate(planes):
        elements[:, byte] = plane
    return elements.data.cast("B")


def unbitshuffle(what: str, data: memoryview, out: Array, element_bytes: int, codec: str = "lz4") -> None:
    """Decodes bitshuffled blocks of elements of `element_bytes` into `out`, contiguous. `codec`: lz4 or zstd."""
    block = _framed(what, data, out.nbytes)
    if element_bytes not in (1, 2, 4, 8) or out.nbytes % element_bytes or block % (_ELEMENTS * element_bytes):
        raise MessageError(f"{what}: bitshuffled in blocks of {block} bytes with elements of {element_bytes}")
    rest = out.nbytes % (_ELEMENTS * element_bytes)
    _chained(what, data, -(-(out.nbytes - rest) // block), rest)
    _through(what, hdf5plugin.Bitshuffle(cname=codec), data, out.reshape(-1).view(f"u{element_bytes}"))


def unlz4(what: str, data: memoryview, out: Array) -> None:
    """Decodes LZ4 blocks in the framing of HDF5's filter into `out`, contiguous. Not by that filter, which prints."""
    block = min(_framed(what, data, out.nbytes), out.nbytes)
    _chained(what, data, -(-out.nbytes // block), 0)
    pixels, codec, at = out.reshape(-1).view(np.uint8), pyarrow.Codec("lz4_raw"), _HEADER.size
    for begin in range(0, out.nbytes, block):
        part, length = pixels[begin : begin + block], _LENGTH.unpack_from(data, at)[0]
        at += _LENGTH.size + length
        raw = data[at - length : at]
        try:  # a block that LZ4 does not make smaller is stored as it is
            part[:] = np.frombuffer(raw if length == len(part) else codec.decompress(raw, len(part)), np.uint8)
        except (OSError, ValueError) as error:
            raise MessageError(f"{what}: its compressed bytes are damaged: {error}") from error


def unzfp(what: str, data: memoryview, out: Array, words: tuple[int, ...]) -> None:
    """Decodes a ZFP stream into `out` of the chunk's shape and stored type. `words` are the filter's values: its
    version and the stream's header."""
    if out.dtype.newbyteorder("=").name not in _ZFP_TYPES:
        raise MessageError(f"{what}: ZFP of type {out.dtype}, expected one of {', '.join(_ZFP_TYPES)}")
    sizes = [size for size in out.shape if size > 1] or [1]
    minbits, maxbits, maxprec, minexp = _zfp_mode(words)
    values = 4 ** len(sizes)
    # The most that the decoder takes for a block: a head, and for each bit plane a bit a value and a test, and a second
    # bit once a value. In modes of fixed length it is told.
    block_bits = max(minbits, min(maxbits, 8 * out.itemsize * (values + 1) + 2 * values + 64))
    stream_bytes = math.prod(-(-size // 4) for size in sizes) * block_bits // 8 + 64
    if block_bits > 4 * 8 * out.itemsize * values + 64:
        raise MessageError(f"{what}: ZFP with {block_bits} bits for {values} values, more than they have")
    padded = np.zeros(max(stream_bytes, len(data)), np.uint8)
    padded[: len(data)] = data
    mode = hdf5plugin.Zfp(minbits=minbits, maxbits=maxbits, maxprec=maxprec, minexp=minexp)
    _through(what, mode, padded.data, out, words)


def compressed(array: Array, filters: Mapping[str, Any]) -> bytes:
    """`array`, contiguous, as one chunk through HDF5's `filters`."""
    with h5py.File(io.BytesIO(), "w") as file:
        dataset = file.create_dataset("array", data=array, chunks=array.shape, **filters)
        return bytes(dataset.id.read_direct_chunk((0,) * array.ndim)[1])


def _framed(what: str, data: memoryview, size: int) -> int:
    """The bytes of a block, from the header that bitshuffle and LZ4 share."""
    if len(data) < _HEADER.size:
        raise MessageError(f"{what}: {len(data)} compressed bytes are too few for their header")
    declared, block = _HEADER.unpack_from(data)
    if declared != size:
        raise MessageError(f"{what}: compressed from {declared} bytes, expected {size}")
    if not 0 < block <= _MOST_BLOCK_BYTES or size // block > _MOST_BLOCKS:
        raise MessageError(f"{what}: compressed in blocks of {block} bytes")
    return int(block)


def _chained(what: str, data: memoryview, blocks: int, rest: int) -> None:
    """Raises `MessageError` unless `blocks` blocks, each after its length, and `rest` bytes are all that follows."""
    at, end = _HEADER.size, len(data) - rest
    length_at = _LENGTH.unpack_from
    for _ in range(blocks):
        if at + _LENGTH.size > end:
            break
        at += _LENGTH.size + length_at(data, at)[0]
    else:
        if at == end:
            return
    raise MessageError(
        f"{what}: its {blocks} compressed blocks do not end where its bytes do; it is cut short or damaged"
    )


def _zfp_mode(words: tuple[int, ...]) -> tuple[int, int, int, int]:
    """(minbits, maxbits, maxprec, minexp) from the header of a stream: 32 bits of magic, 52 of type and shape, then 12
    of a mode by number, or 64 of the four (zfp.readthedocs.io, "Header")."""
    bits = int.from_bytes(b"".join(word.to_bytes(4, "little") for word in words[1:]), "little") >> 84
    short, long = bits & 0xFFF, bits >> 12
    if short == 0xFFF:
        return (long & 0x7FFF) + 1, (long >> 15 & 0x7FFF) + 1, (long >> 30 & 0x7F) + 1, (long >> 37 & 0x7FFF) - 16495
    if short < 2048:
        return short + 1, short + 1, 64, -1074
    if short < 2176:
        return 1, 16658, short - 2047, -1074
    return 1, 16658, 64, -1075 if short == 2176 else short - 2177 - 1074


def _through(
    what: str, filters: Mapping[str, Any], data: memoryview, out: Array, words: tuple[int, ...] | None = None
) -> None:
    """One chunk through one of HDF5's filters into `out`, in a file in memory that is made for it. `words`, where
    given, must be the values, but for the version, that the filter has for an array such as `out`."""
    try:
        with h5py.File(io.BytesIO(), "w") as file:
            dataset = file.create_dataset("array", out.shape, out.dtype, chunks=out.shape, **filters)
            own = dataset.id.get_create_plist().get_filter(0)[2]
            if words is not None and own[1:] != words[1:]:
                raise MessageError(f"{what}: the header of its compression is of another shape, type or version")
            dataset.id.write_direct_chunk((0,) * out.ndim, data)
            dataset.read_direct(out)
    except (OSError, RuntimeError, ValueError) as error:
        if isinstance(error, MessageError):
            raise
        raise MessageError(f"{what}: its compressed bytes are damaged: {error}") from error
