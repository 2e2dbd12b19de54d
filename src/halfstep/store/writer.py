"""DatasetWriter: append sequences to a store, shard by shard, never holding more than a batch in memory."""

from __future__ import annotations

import shutil
import time
import zlib
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

import numpy as np

from halfstep.errors import InputError, StoreError
from halfstep.files import (
    FileLock,
    claim,
    file_errors,
    fsync_path,
    rename_durably,
    sha256_of,
    write_all,
    write_durably,
)
from halfstep.spec import LatentSpec
from halfstep.store.formats import LATENT_ARRAYS, NUMPY_TYPES, Array, safetensors_name, to_storage
from halfstep.store.index import (
    Row,
    checksum_path,
    index_path,
    rows_to_bytes,
    shard_path,
    used_numbers,
)
from halfstep.store.manifest import NAME as MANIFEST_NAME
from halfstep.store.manifest import Manifest, parse_manifest
from halfstep.store.shard import write_shard

SHARD_BYTES = 128 << 20
COMMIT_SECONDS = 60.0
_NATIVE_TYPES = {np.dtype("<f8"): "F64", np.dtype("<f4"): "F32", np.dtype("<i4"): "I32"}


@dataclass
class _Spool:
    """One array of the open shard, growing in a file of its own."""

    file: IO[bytes]
    type_name: str
    row_shape: tuple[int, ...]
    checksum: int = 0  # of the open sequence


class DatasetWriter:
    """Write sequences into the store at `root`, creating it when it is not there.

    A sequence is built by `extend` and closed by `finish`, or given at once to `append`; `abandon` drops what was
    extended. Sequences become visible to readers, and durable, when their shard is committed: by `commit`, at
    `shard_bytes`, after `commit_seconds`, or on a clean exit of the `with` block. Leaving the block by an exception
    commits nothing. Any number of writers may write one store at once; each claims its own shard numbers. A key that is
    written again supersedes the older one. `lock` is the writers' lock when the caller holds it alone already.
    """

    def __init__(
        self,
        root: Path | str,
        manifest: Manifest,
        *,
        shard_bytes: int = SHARD_BYTES,
        commit_seconds: float = COMMIT_SECONDS,
        lock: FileLock | None = None,
    ) -> None:
        self._root = Path(root)
        self._storage = manifest.storage
        self._spec = manifest.spec
        self._shard_bytes, self._commit_seconds = shard_bytes, commit_seconds
        self._spools: dict[str, _Spool] = {}
        self._rows: list[Row] = []
        self._staging: Path | None = None
        self._pending = self._items = 0
        self._bytes = 0
        with file_errors(self._root):
            create_store(self._root, manifest)
            self._lock = lock or FileLock(self._root / ".writers.lock")
            self._owns_lock = lock is None
            if self._owns_lock:
                if self._lock.try_exclusive():
                    remove_leftovers(self._root)
                self._lock.share()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, _: BaseException | None, __: TracebackType | None) -> None:
        try:
            if kind is None:
                self.commit()
        finally:
            self._discard()
            if self._owns_lock:
                self._lock.release()

    def extend(self, **arrays: Array) -> None:
        """Add frames to the open sequence: arrays [n, ...] of equal n, `latents` [n, C, (T,) H, W] among them.

        Latents and logvar may come as float (rounded here) or already in the storage type (bf16 as its bits in uint16);
        what belongs to each frame (`frame`, `position`, `yaw`) keeps its type. Raises NumericsError when a value does
        not fit, InputError when shapes disagree with the sequences before.
        """
        stored = {
            name: to_storage(values, self._storage) if name in LATENT_ARRAYS else np.asarray(values)
            for name, values in arrays.items()
        }
        if "latents" not in stored or stored["latents"].shape[1] != self._spec.channels:
            raise InputError(f"latents: expected [n, {self._spec.channels}, ...], got {arrays['latents'].shape}")
        if len({len(values) for values in stored.values()}) != 1:
            raise InputError(f"arrays of one sequence differ in length: { {k: len(v) for k, v in stored.items()} }")
        with file_errors(self._root):
            if not self._matches_spools(stored):
                self._start_shard(stored)
            for name, values in stored.items():
                spool = self._spools[name]
                data = np.ascontiguousarray(values).data.cast("B") if values.size else b""
                write_all(spool.file, data)
                spool.checksum = zlib.crc32(data, spool.checksum)
        self._pending += len(stored["latents"])

    def finish(
        self,
        key: str,
        *,
        label: str | None = None,
        fingerprint: bytes | None = None,
        digests: bytes = b"",
        attributes: dict[str, Any] | None = None,
    ) -> None:
        """Close the open sequence under `key`, and commit the shard when it is large or old enough."""
        if self._pending == 0:
            raise InputError(f"{key}: a sequence needs at least one frame")
        row = Row(key, -1, self._items, self._pending, label, digests=digests, attributes=attributes or {})
        checksums = {(name, s.type_name, s.row_shape): s.checksum for name, s in self._spools.items()}
        row = replace(row, checksum=sequence_checksum(checksums))
        self._rows.append(replace(row, fingerprint=fingerprint) if fingerprint is not None else row)
        self._items += self._pending
        self._reset_sequence()
        self._bytes = sum(spool.file.tell() for spool in self._spools.values())
        if self._bytes >= self._shard_bytes or time.monotonic() - self._opened >= self._commit_seconds:
            self.commit()

    def append(self, key: str, latents: Array, *, label: str | None = None, **arrays: Array) -> None:
        """Write one whole sequence."""
        self.extend(latents=latents, **arrays)
        self.finish(key, label=label)

    def abandon(self) -> None:
        """Drop the frames of the open sequence."""
        for spool in self._spools.values():
            row_bytes = int(np.prod(spool.row_shape, dtype=np.int64)) * NUMPY_TYPES[spool.type_name].itemsize
            spool.file.truncate(self._items * row_bytes)
            spool.file.seek(0, 2)
        self._reset_sequence()

    def commit(self) -> None:
        """Make all finished sequences durable and visible. The open sequence, if any, must be finished before."""
        if self._pending:
            raise InputError("commit: a sequence is still open; finish or abandon it first")
        if not self._rows:
            return
        root, number, staging = self._root, self._number, self._staging
        assert staging is not None
        with file_errors(root):
            index = rows_to_bytes(replace(row, shard=number) for row in self._rows)
            spools = {
                name: (spool.file, spool.type_name, (self._items, *spool.row_shape))
                for name, spool in self._spools.items()
            }
            metadata = {"format": "halfstep-shard", "manifest": (root / MANIFEST_NAME).read_text()}
            staged_shard, staged_index = staging / "shard", staging / "index"
            write_shard(staged_shard, spools, metadata, index)
            write_durably(staged_index, index)
            sums = f"{sha256_of(staged_shard)}  shards/{number:05d}.safetensors\n"
            sums += f"{sha256_of(staged_index)}  index/{number:05d}.parquet\n"
            write_durably(checksum_path(root, number), sums.encode())
            rename_durably(staged_shard, shard_path(root, number))
            rename_durably(staged_index, index_path(root, number))  # from here on the shard is committed
        self._discard()

    def _matches_spools(self, stored: dict[str, Array]) -> bool:
        if not self._spools:
            return False
        same = set(stored) == set(self._spools) and all(
            self._spools[name].row_shape == values.shape[1:]
            and self._spools[name].type_name == self._type_name(name, values)
            for name, values in stored.items()
        )
        if not same and self._pending:
            raise InputError("latents: shape, type or set of arrays changed within one sequence")
        shape = stored["latents"].shape[1:]
        if self._spools["latents"].row_shape != shape:
            raise InputError(
                f"latents: got {list(shape)} after {list(self._spools['latents'].row_shape)}; one store holds one shape"
            )
        return same

    def _type_name(self, name: str, values: Array) -> str:
        if name in LATENT_ARRAYS:
            return safetensors_name(self._storage)
        if values.dtype not in _NATIVE_TYPES:
            raise InputError(f"{name}: got {values.dtype}; expected one of float64, float32, int32")
        return _NATIVE_TYPES[values.dtype]

    def _start_shard(self, stored: dict[str, Array]) -> None:
        self.commit()
        self._discard()  # of a shard whose only sequence was abandoned
        types = {name: self._type_name(name, values) for name, values in stored.items()}
        self._number, self._staging = claim_number(self._root)
        self._opened = time.monotonic()
        for name, values in stored.items():
            # Unbuffered: a full disk must be met at the write, not again when the file is closed.
            file = (self._staging / f"{name}.spool").open("w+b", buffering=0)
            self._spools[name] = _Spool(file, types[name], values.shape[1:])

    def _reset_sequence(self) -> None:
        self._pending = 0
        for spool in self._spools.values():
            spool.checksum = 0

    def _discard(self) -> None:
        """Forget the open shard and remove its staging folder."""
        if self._staging is not None:
            for spool in self._spools.values():
                spool.file.close()
            remove_unfinished(self._root, self._staging)
        self._staging = None
        self._spools, self._rows = {}, []
        self._pending = self._items = self._bytes = 0


def sequence_checksum(checksums: dict[tuple[str, str, tuple[int, ...]], int]) -> int:
    """One CRC-32 over those of the single arrays and what they are: (name, type name, shape of a row) -> CRC-32."""
    return zlib.crc32(repr(sorted(checksums.items())).encode())


def create_store(root: Path, manifest: Manifest) -> None:
    """Make the folders and the manifest of a store, or check that the one there holds latents of the same spec.

    Raises InputError when `root` holds something else, or latents of another spec.
    """
    existing = root / MANIFEST_NAME
    if existing.exists():
        require_same_spec(parse_manifest(existing.read_bytes(), str(existing)).spec, manifest.spec, root)
    else:
        claim_store(root)
        root.mkdir(parents=True, exist_ok=True)
        manifest.write(root)  # first: folders without a manifest would look like somebody else's
    for name in ("shards", "index", "staging"):
        (root / name).mkdir(exist_ok=True)
    fsync_path(root)


def claim_store(root: Path) -> bool:
    """Whether there is a store at `root` already. Raises InputError when `root` holds anything else."""
    return claim(root, "latent store", (MANIFEST_NAME,))


def require_same_spec(found: LatentSpec, wanted: LatentSpec, root: Path) -> None:
    """Raise InputError, naming the differences, unless latents of the two specs may share the store at `root`."""
    if differences := found.differences(wanted):
        raise InputError(
            f"{root}: holds latents of another kind ({'; '.join(differences)}); encode into a new folder, or give the "
            "settings that made this store (`halfstep store inspect` shows them)"
        )


def claim_number(root: Path) -> tuple[int, Path]:
    """A shard number that nobody has or had, and its staging folder, which marks it as taken and unfinished."""
    number = max(used_numbers(root), default=-1) + 1
    while True:
        staging = root / "staging" / f"{number:05d}"
        try:
            staging.mkdir()
        except FileExistsError:
            number += 1
            continue
        # Between the listing and the claim another writer may have committed this very number.
        if not index_path(root, number).exists():
            # Durable before anything it marks as unfinished.
            fsync_path(staging.parent)
            return number, staging
        staging.rmdir()
        number += 1


def remove_leftovers(root: Path) -> None:
    """Remove what writers that no longer live left uncommitted. Only for a caller that holds the writers' lock
    alone."""
    for staging in sorted((root / "staging").iterdir()):
        remove_unfinished(root, staging)


def remove_unfinished(root: Path, staging: Path) -> None:
    """Remove a staging folder, and what a commit that it never finished has put in place already."""
    number = int(staging.name)
    if not index_path(root, number).exists():
        shard_path(root, number).unlink(missing_ok=True)
        checksum_path(root, number).unlink(missing_ok=True)
    shutil.rmtree(staging)


def read_manifest(root: Path) -> Manifest:
    """The manifest of a local store. Raises StoreError when there is no store."""
    path = root / MANIFEST_NAME
    if not path.is_file():
        raise StoreError(f"{root}: no store here (no {MANIFEST_NAME}); `halfstep encode -i SRC -o {root}` makes one")
    return parse_manifest(path.read_bytes(), str(path))
