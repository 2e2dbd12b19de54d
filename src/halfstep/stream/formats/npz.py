"""lclstreamer's npz messages: a zip of `.npy` arrays, `key.npy` each. Stored members are viewed in place; nothing is
unpickled, and nothing grows beyond what its header declares."""

from __future__ import annotations

import io
import tokenize
import zipfile
import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.lib import format as npy

from halfstep.stream.events import Array, Event, Message, MessageError
from halfstep.stream.formats.arrays import arrays_of, message_of
from halfstep.stream.formats.base import Fields, Viewed, plain, refusing, shown, sized, view_of
from halfstep.stream.formats.compression import inflate

_DIRECTORY_BYTES = 1 << 20
_HEADER_BYTES = 10_240  # of a .npy; numpy's own limit is 10,000 characters
_MEMBER, _END = b"PK\3\4", b"PK\5\6"
_LOCAL_BYTES = 30  # of the fixed part of a member's local header
_END_BYTES = 22  # of the end of the directory, without its comment
_ENCRYPTED = 0x1 | 0x40 | 0x2000  # flags of a member
_KEYS = {  # our names -> lclstreamer's
    "data": "detector_data",
    "timestamp": "timestamp",
    "photon_wavelength": "photon_wavelength",
    "original_shape": "detector_data_original_shape",
}


def decode(message: bytes | memoryview, fields: Fields) -> Message:
    """The events of a message. `data` of an event is a view of the message where its member is stored, of native byte
    order and C order, and then not writable and at any alignment. Every member that is read has its CRC-32 checked.
    Raises `MessageError`."""
    with refusing("npz message"):
        view = view_of(message)
        members = _members(view)

        def read(key: str, most: int) -> Array | None:
            member = members.get(f"{key}.npy")
            return None if member is None else _array(key, view, member, most)

        return message_of(fields, read, lambda: [name.removesuffix(".npy") for name in members])


def encode(events: Sequence[Event], compressed: bool = False) -> bytes:
    """What lclstreamer's serializer sends of `events` [C, H, W], which share shape and type. Raises `InputError`."""
    file = io.BytesIO()
    arrays = {_KEYS[name]: array for name, array in arrays_of(events).items()}
    (np.savez_compressed if compressed else np.savez)(file, **arrays)  # type: ignore[arg-type]
    return file.getvalue()


def _members(view: memoryview) -> dict[str, zipfile.ZipInfo]:
    if bytes(view[:4]) != _MEMBER:
        raise MessageError(f"it begins with {bytes(view[:4])!r}, expected a zip archive")
    try:
        with zipfile.ZipFile(Viewed(view, _DIRECTORY_BYTES)) as archive:
            listed, comment = archive.infolist(), archive.comment
    except (zipfile.BadZipFile, zipfile.LargeZipFile, NotImplementedError) as error:
        raise MessageError(f"its directory cannot be read, it may be cut short: {error}") from error
    end = len(view) - _END_BYTES - len(comment)
    if bytes(view[end : end + 4]) != _END:
        raise MessageError("bytes follow the end of the archive; send one archive a message")
    members = {member.filename: member for member in listed}
    if len(members) != len(listed):
        raise MessageError("two members have the same name; send each array once")
    return members


def _array(key: str, view: memoryview, member: zipfile.ZipInfo, most: int) -> Array:
    raw = _content(key, view, member, most + _HEADER_BYTES)
    header = io.BytesIO(raw[:_HEADER_BYTES])
    try:
        version = npy.read_magic(header)
        readers: dict[tuple[int, int], Any] = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}
        if version not in readers:
            raise MessageError(f"{key}: .npy version {version}, expected 1.0 or 2.0")
        shape, column_major, dtype = readers[version](header)
    except (ValueError, TypeError, SyntaxError, tokenize.TokenError, RecursionError, MemoryError) as error:
        if isinstance(error, MessageError):
            raise
        raise MessageError(f"{key}: its .npy header cannot be read: {error}") from error
    plain(key, dtype)
    size = sized(key, shape, dtype.itemsize, most)
    if size != len(raw) - header.tell():
        raise MessageError(f"{key}: {len(raw) - header.tell()} bytes of data, expected {size} for shape {shown(shape)}")
    array: Array = np.frombuffer(raw, dtype, offset=header.tell())
    return array.reshape(shape, order="F" if column_major else "C")


def _content(key: str, view: memoryview, member: zipfile.ZipInfo, most: int) -> memoryview:
    """The decompressed bytes of a member, `most` of them at most."""
    if member.flag_bits & _ENCRYPTED:
        raise MessageError(f"{key}: it is encrypted; send it plain")
    if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise MessageError(f"{key}: zip compression {member.compress_type}, expected 0 (stored) or 8 (deflated)")
    if member.file_size > most:
        raise MessageError(
            f"{key}: declares {member.file_size} bytes, more than the limit; raise largest_bytes if meant"
        )
    local = view[member.header_offset : member.header_offset + _LOCAL_BYTES]
    if len(local) < _LOCAL_BYTES or bytes(local[:4]) != _MEMBER:
        raise MessageError(f"{key}: no member is where the directory says, at byte {member.header_offset}")
    begin = member.header_offset + _LOCAL_BYTES + sum(int.from_bytes(local[at : at + 2], "little") for at in (26, 28))
    raw = view[begin : begin + member.compress_size]
    if len(raw) != member.compress_size:
        raise MessageError(f"{key}: {len(raw)} of its {member.compress_size} bytes are there")
    if member.compress_type == zipfile.ZIP_DEFLATED:
        raw = inflate(key, raw, member.file_size, -zlib.MAX_WBITS)
    elif member.compress_size != member.file_size:
        raise MessageError(f"{key}: stored in {member.compress_size} bytes, expected {member.file_size}")
    if zlib.crc32(raw) != member.CRC:
        raise MessageError(f"{key}: its CRC-32 is not the one that was sent; it was damaged on its way")
    return raw
