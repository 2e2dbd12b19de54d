"""What the bytes of a video file tell that its packets do not: whether it is cut, repeats, and where it is broken."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

# The end of the element at an offset; None for one of unknown length, or for what is no element of the format.
_EndOf = Callable[[BinaryIO, int], int | None]

_BOXES = frozenset(b"ftyp styp moov moof mdat free skip wide uuid meta sidx ssix mfra emsg prft pnot udta pdin".split())
_EBML, _SEGMENT = b"\x1a\x45\xdf\xa3", b"\x18\x53\x80\x67"
_CLUSTER = b"\x1f\x43\xb6\x75"
_DESCENDED = frozenset({_SEGMENT, _CLUSTER})
# The header, what may be in a segment, and what may be in a cluster.
_SKIPPED = frozenset(
    {_EBML}
    | {
        bytes.fromhex(name)
        for name in ("114d9b74", "1549a966", "1654ae6b", "1c53bb6b", "1254c367", "1941a469", "1043a770")
    }
    | {bytes.fromhex(name) for name in ("e7", "a3", "a0", "ab", "a7", "5854", "af", "ec", "bf")}
)
_BLOCK = 1 << 20  # bytes to search at a time
# Some writers of RIFF count the header in, or forget the last byte that makes the size even.
_RIFF_SLACK = 8
_ASF_HEADER = bytes.fromhex("3026b2758e66cf11a6d900aa0062ce6c")
_ASF_OBJECTS = frozenset(
    {_ASF_HEADER}
    | {
        bytes.fromhex(name)
        for name in (
            "3626b2758e66cf11a6d900aa0062ce6c",  # data
            "90080033b1e5cf1189f400a0c90349cb",  # simple index
            "d329e2d6da35d111903400a0c90349be",  # index
        )
    }
)


def missing_bytes(path: Path) -> int:
    """How many bytes a file lacks at its end, as far as its format tells: ISO media (MP4, MOV), RIFF (AVI), Matroska
    (MKV, WebM) and ASF (WMV) do, MPEG streams do not, nor do recordings of unknown length."""
    with path.open("rb") as file:
        head = file.read(16)
        end_of: _EndOf | None = None
        if head[:4] == b"RIFF":
            end_of = _riff_chunk
        elif head[:4] == _EBML:
            end_of = _matroska_element
        elif head == _ASF_HEADER:
            end_of = _asf_object
        elif head[4:8] in _BOXES:
            end_of = _iso_box
        if end_of is None:
            return 0
        size, at = path.stat().st_size, 0
        while at < size:
            end = end_of(file, at)
            if end is None or end <= at:
                return 0
            at = end
        return at - size


def _read(file: BinaryIO, at: int, count: int) -> bytes:
    file.seek(at)
    return file.read(count)


def _iso_box(file: BinaryIO, at: int) -> int | None:
    head = _read(file, at, 16)
    if len(head) < 8 or head[4:8] not in _BOXES:
        return None
    size = int.from_bytes(head[:4], "big")
    if size == 1 and len(head) == 16:
        size = int.from_bytes(head[8:], "big")
    return at + size if size >= 8 else None  # 0: to the end of the file, wherever that is


def _riff_chunk(file: BinaryIO, at: int) -> int | None:
    head = _read(file, at, 8)
    if len(head) < 8 or head[:4] != b"RIFF":
        return None
    size = int.from_bytes(head[4:], "little")
    end, there = at + 8 + size + size % 2, file.seek(0, 2)
    if size == 0:
        return None  # a recording that was never finished
    return there if there < end <= there + _RIFF_SLACK else end


def _matroska_element(file: BinaryIO, at: int) -> int | None:
    head = _read(file, at, 12)
    if head[:4] not in (_EBML, _SEGMENT) or len(head) < 5:
        return None
    length = 9 - head[4].bit_length()  # of the size, in bytes: the first bit that is set tells
    mask = (1 << 7 * length) - 1
    size = int.from_bytes(head[4 : 4 + length], "big") & mask
    return None if size == mask else at + 4 + length + size


def _asf_object(file: BinaryIO, at: int) -> int | None:
    head = _read(file, at, 24)
    if head[:16] not in _ASF_OBJECTS or len(head) < 24:
        return None
    return at + int.from_bytes(head[16:], "little")


def avi_moments(path: Path, stream: int) -> int:
    """The chunks of a stream of an AVI file, the empty ones included, which say to show the frame before again."""
    count, size, at = 0, path.stat().st_size, 0
    with path.open("rb") as file:
        while at + 8 <= size:
            head = _read(file, at, 12)
            length = int.from_bytes(head[4:8], "little")
            if head[:4] in (b"RIFF", b"LIST") and head[8:12] in (b"AVI ", b"AVIX", b"movi", b"rec "):
                at += 12
                continue
            at += 8 + length + length % 2
            count += head[:2] == b"%02d" % stream and head[2:4] != b"pc" and at <= size
    return count


def matroska_faults(path: Path) -> list[int]:
    """The bytes at which the elements of a Matroska file are not what they must be; a demuxer looks for the next
    cluster behind them, without a word."""
    faults: list[int] = []
    size, at = path.stat().st_size, 0
    with path.open("rb") as file:
        while at < size:
            head = _read(file, at, 16)
            id_length = 9 - head[0].bit_length()
            name = head[:id_length]
            if name not in _DESCENDED and name not in _SKIPPED:
                faults.append(at)
                at = _find(file, _CLUSTER, at + 1)
                continue
            if len(head) <= id_length:
                break
            size_length = 9 - head[id_length].bit_length()
            mask = (1 << 7 * size_length) - 1
            length = int.from_bytes(head[id_length : id_length + size_length], "big") & mask
            at += id_length + size_length
            if name == _SEGMENT and length != mask:
                size = min(size, at + length)
            elif name not in _DESCENDED:
                at += length
    return faults


def _find(file: BinaryIO, wanted: bytes, at: int) -> int:
    """The next place of some bytes, or the end of the file."""
    while block := _read(file, at, _BLOCK):
        if (found := block.find(wanted)) >= 0:
            return at + found
        if len(block) < _BLOCK:
            return at + len(block)
        at += _BLOCK - len(wanted) + 1
    return at
