"""One shard: a plain safetensors file, written as a stream and read through a memory map or ranged requests.

Layout (https://huggingface.co/docs/safetensors): 8 bytes little-endian header length, JSON header, arrays one after the
other. The file is assembled here because the library wants whole arrays in memory and gives no offsets for mapping.
"""

from __future__ import annotations

import json
import mmap
import os
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Protocol

import numpy as np

from halfstep.errors import StoreError
from halfstep.files import copy_bytes
from halfstep.store.formats import NUMPY_TYPES, Array

INDEX_ARRAY = "index"  # the shard's own index part, so that a lost index can be rebuilt


@dataclass(frozen=True)
class ArrayLayout:
    """Where one array lies in a shard: type, shape [n, ...] and the file offset of its first byte."""

    type_name: str
    shape: tuple[int, ...]
    offset: int

    @property
    def row_values(self) -> int:
        return int(np.prod(self.shape[1:], dtype=np.int64))

    @property
    def row_bytes(self) -> int:
        return self.row_values * NUMPY_TYPES[self.type_name].itemsize


def parse_header(raw: bytes, where: str) -> tuple[dict[str, ArrayLayout], dict[str, str]]:
    """Layouts and metadata from the bytes after the length field. Raises StoreError on anything malformed."""
    try:
        header = json.loads(raw)
        metadata = header.pop("__metadata__", {})
        start = 8 + len(raw)
        return {
            name: ArrayLayout(entry["dtype"], tuple(entry["shape"]), start + entry["data_offsets"][0])
            for name, entry in header.items()
        }, metadata
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise StoreError(f"{where}: damaged safetensors header ({error}); run `halfstep store verify`") from error


def write_shard(
    path: Path, spools: dict[str, tuple[IO[bytes], str, tuple[int, ...]]], metadata: dict[str, str], index: bytes
) -> None:
    """Assemble and sync a shard from spooled arrays (file at its end, type name, full shape) and its index part.

    Arrays are ordered by item size, so that each is aligned for its type.
    """
    ordered = sorted(spools.items(), key=lambda item: (-NUMPY_TYPES[item[1][1]].itemsize, item[0]))
    header: dict[str, Any] = {"__metadata__": metadata}
    offset = 0
    for name, (_, type_name, shape) in ordered:
        size = int(np.prod(shape, dtype=np.int64)) * NUMPY_TYPES[type_name].itemsize
        header[name] = {"dtype": type_name, "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset += size
    header[INDEX_ARRAY] = {"dtype": "U8", "shape": [len(index)], "data_offsets": [offset, offset + len(index)]}
    raw = json.dumps(header).encode()
    raw += b" " * (-len(raw) % 8)
    with path.open("wb") as file:
        file.write(len(raw).to_bytes(8, "little"))
        file.write(raw)
        for _, (spool, _, _) in ordered:
            spool.seek(0)
            copy_bytes(spool, file)
        if file.tell() != 8 + len(raw) + offset:
            raise StoreError(f"{path}: {file.tell() - 8 - len(raw)} bytes of arrays; its header says {offset}")
        file.write(index)
        file.flush()
        os.fsync(file.fileno())


class Shard(Protocol):
    """An opened shard."""

    layouts: dict[str, ArrayLayout]
    metadata: dict[str, str]

    def rows(self, name: str, start: int, stop: int) -> Array:
        """Rows [start, stop) of an array, as stored."""


class MappedShard:
    """A local shard behind a read-only memory map: `rows` returns views and copies nothing.

    Raises FileNotFoundError when the file is gone, StoreError when it is damaged.
    """

    def __init__(self, path: Path) -> None:
        try:
            with path.open("rb") as file:
                mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except FileNotFoundError:
            raise
        except (OSError, ValueError) as error:
            raise StoreError(f"{path}: cannot be read ({error}); run `halfstep store verify`") from error
        length = int.from_bytes(mapped[:8], "little")
        self.layouts, self.metadata = parse_header(mapped[8 : 8 + length], str(path))
        try:
            self._arrays = {
                name: np.ndarray(layout.shape, NUMPY_TYPES[layout.type_name], mapped, layout.offset)
                for name, layout in self.layouts.items()
            }
        except (TypeError, KeyError, ValueError) as error:
            raise StoreError(f"{path}: header and size disagree ({error}); run `halfstep store verify`") from error

    def rows(self, name: str, start: int, stop: int) -> Array:
        return self._arrays[name][start:stop]


class RemoteShard:
    """A shard behind an fsspec filesystem: each `rows` call is one ranged request."""

    def __init__(self, filesystem: Any, path: str) -> None:
        self._filesystem, self._path = filesystem, path
        length = int.from_bytes(filesystem.cat_file(path, start=0, end=8), "little")
        self.layouts, self.metadata = parse_header(filesystem.cat_file(path, start=8, end=8 + length), path)

    def rows(self, name: str, start: int, stop: int) -> Array:
        layout = self.layouts[name]
        begin, end = (layout.offset + row * layout.row_bytes for row in (start, stop))
        data = self._filesystem.cat_file(self._path, start=begin, end=end)
        return np.frombuffer(data, NUMPY_TYPES[layout.type_name]).reshape(stop - start, *layout.shape[1:])
