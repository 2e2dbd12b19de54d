"""Look after a local store: verify every byte, repair what a crash or a bad disk left, drop what is dead."""

from __future__ import annotations

import hashlib
import math
import zlib
from collections.abc import Collection, Iterable
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from itertools import groupby
from pathlib import Path

import numpy as np
import pyarrow as pa

from halfstep.errors import HalfstepError, StoreError
from halfstep.files import FileLock, alone, file_errors, fsync_path, sha256_of, write_durably
from halfstep.store.formats import Array, storage_of
from halfstep.store.index import (
    REMOVED_MARK,
    Index,
    Row,
    checksum_path,
    committed_numbers,
    index_path,
    read_table,
    rows_from_table,
    shard_path,
    used_numbers,
)
from halfstep.store.manifest import NAME as MANIFEST_NAME
from halfstep.store.manifest import parse_manifest
from halfstep.store.shard import INDEX_ARRAY, MappedShard
from halfstep.store.writer import (
    SHARD_BYTES,
    DatasetWriter,
    read_manifest,
    remove_leftovers,
    remove_unfinished,
    sequence_checksum,
)

_ADVICE = "run `halfstep store repair`"


@dataclass(frozen=True)
class VerifyReport:
    """What `verify` found. `shards` and `items` count what is committed and readable; `problems` are lines for
    people."""

    shards: int
    items: int
    problems: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        return not self.problems


@dataclass(frozen=True)
class RepairReport:
    """What `repair` did: index parts and manifest rebuilt, sequences that were lost with their damaged bytes."""

    rebuilt: list[str]
    lost: list[str]


def verify(root: Path | str) -> VerifyReport:
    """Read every byte of the store at `root` and hold it against the checksums.

    Finds any changed bit in shards, index parts, checksum files and manifest, files that are missing, and rows that
    point outside their shard. What an interrupted writer left uncommitted is no problem: no reader sees it. Raises
    StoreError when there is no store.
    """
    root = Path(root)
    _require_store(root)
    problems = [] if (problem := _manifest_problem(root)) is None else [problem]
    # Shards before the index: one that is committed meanwhile must not look as if it had no index part.
    on_disk = [int(path.stem) for path in (root / "shards").glob("[0-9]*.safetensors")]
    numbers, parts = committed_numbers(root), []
    for number in numbers:
        found = _shard_problems(root, number)
        if found and not index_path(root, number).exists():
            continue  # merged into another shard or dropped since the listing
        problems += found
        if not found:
            parts.append(read_table(index_path(root, number), str(number)))
    for number in sorted(set(on_disk) - set(numbers)):
        if shard_path(root, number).exists() and not _is_unfinished(root, number):
            problems.append(f"index/{number:05d}.parquet: missing, though its shard is there; {_ADVICE}")
    index = Index(parts)
    return VerifyReport(len(numbers), index.items_in(index), problems)


def repair(root: Path | str) -> RepairReport:
    """Make the store at `root` whole again without its sources, losing only sequences whose own bytes are damaged.

    A damaged manifest or index part is rebuilt from the copies inside the shards; sequences of a damaged shard that
    still match their checksums move to a new shard. Encoding the same sources again brings back what was lost.
    """
    root = Path(root)
    _require_store(root)
    with file_errors(root), alone(root, ".writers.lock") as lock:
        remove_leftovers(root)
        rebuilt = _rebuild_manifest(root)
        on_disk = {int(path.stem) for path in (root / "shards").glob("[0-9]*.safetensors")}
        numbers = sorted(on_disk | set(committed_numbers(root)))
        tables = {number: _trusted_table(root, number) for number in numbers}
        index = Index(table for table in tables.values() if table is not None)
        by_shard: dict[int, list[str]] = {}
        for key in index:
            by_shard.setdefault(index.shard_of(key), []).append(key)
        lost: list[str] = []
        damaged = [number for number in numbers if _shard_problems(root, number)]
        for number in damaged:
            live = [index[key] for key in by_shard.get(number, [])]
            good = _intact_rows(root, number, live)
            kept = {row.key for row in good}
            lost += [row.key for row in live if row.key not in kept]
            if tables[number] is None:
                lost.append(f"every sequence of shard {number:05d}")
            elif good:
                rebuilt.append(f"shard {number:05d}: {len(good)} of {len(live)} sequences")
            _move_rows(root, good, lock)
        for number in damaged:
            _remove_shard(root, number)
    return RepairReport(rebuilt, lost)


def compact(root: Path | str, drop: Collection[str] = (), shard_bytes: int = SHARD_BYTES) -> int:
    """Remove the sequences `drop` and superseded ones, and merge small shards; return the number of items removed.

    What lives is committed in new shards before the old ones go, so a crash in between loses nothing. Raises
    BusyError while another process writes the store.
    """
    root = Path(root)
    with file_errors(root), alone(root, ".writers.lock") as lock:
        remove_leftovers(root)
        index = Index.read(root)
        dropped = {key for key in drop if key in index}
        rewrite = index.dead_shards() | {index.shard_of(key) for key in dropped} | _small_shards(root, shard_bytes)
        keys = [key for key in index if key not in dropped and index.shard_of(key) in rewrite]
        _move_rows(root, (index[key] for key in sorted(keys, key=index.shard_of)), lock, shard_bytes)
        for number in sorted(rewrite):
            _remove_shard(root, number)
    return index.items_in(dropped)


def _require_store(root: Path) -> None:
    if not (root / "index").is_dir() and not (root / MANIFEST_NAME).exists():
        raise StoreError(f"{root}: no store here; `halfstep encode -i SRC -o {root}` makes one")


def _is_unfinished(root: Path, number: int) -> bool:
    return (root / "staging" / f"{number:05d}").exists()


def _small_shards(root: Path, shard_bytes: int) -> set[int]:
    """Shards that are worth merging: far below the wanted size, and with another one of the same arrays."""
    alike: dict[str, set[int]] = {}
    for number in committed_numbers(root):
        path = shard_path(root, number)
        if path.stat().st_size < shard_bytes // 4:
            alike.setdefault(_arrays_of(MappedShard(path)), set()).add(number)
    return {number for numbers in alike.values() if len(numbers) > 1 for number in numbers}


def _arrays_of(shard: MappedShard) -> str:
    """What must agree for sequences to share a shard: names, types and shapes of the arrays."""
    layouts = {name: (entry.type_name, entry.shape[1:]) for name, entry in shard.layouts.items() if name != INDEX_ARRAY}
    return repr(sorted(layouts.items()))


def _move_rows(root: Path, rows: Iterable[Row], lock: FileLock, shard_bytes: int = SHARD_BYTES) -> None:
    """Copy sequences, bytes as they are, into new committed shards, those with the same arrays together.

    `rows` come shard by shard: one shard is mapped at a time, however many there are.
    """
    manifest = read_manifest(root)
    with ExitStack() as stack:
        writers: dict[str, DatasetWriter] = {}
        for number, group in groupby(rows, key=lambda row: row.shard):
            shard = MappedShard(shard_path(root, number))
            arrays = _arrays_of(shard)
            if arrays not in writers:
                alike = replace(manifest, storage=storage_of(shard.layouts["latents"].type_name))
                writer = DatasetWriter(root, alike, shard_bytes=shard_bytes, commit_seconds=math.inf, lock=lock)
                writers[arrays] = stack.enter_context(writer)
            for row in group:
                writers[arrays].extend(**_row_arrays(shard, row))
                writers[arrays].finish(
                    row.key,
                    label=row.label,
                    fingerprint=row.fingerprint,
                    digests=row.digests,
                    attributes=row.attributes,
                )


def _remove_shard(root: Path, number: int) -> None:
    """The index part goes first: without it the rest is no longer part of the store, whatever happens next."""
    newest = root / f"{REMOVED_MARK}{max(used_numbers(root)):05d}"
    newest.touch()
    fsync_path(root)
    for mark in root.glob(f"{REMOVED_MARK}*"):
        if mark != newest:
            mark.unlink()
    staging = root / "staging" / f"{number:05d}"
    staging.mkdir(exist_ok=True)  # marks what follows as unfinished until it is done
    fsync_path(staging.parent)
    index_path(root, number).unlink(missing_ok=True)
    fsync_path(root / "index")
    remove_unfinished(root, staging)


def _manifest_problem(root: Path) -> str | None:
    path = root / MANIFEST_NAME
    if not path.is_file():
        return f"{MANIFEST_NAME}: missing; run `halfstep store repair`"
    try:
        parse_manifest(path.read_bytes(), MANIFEST_NAME)
    except HalfstepError as error:
        return str(error)
    return None


def _shard_problems(root: Path, number: int) -> list[str]:
    sums = checksum_path(root, number)
    listed = _listed_checksums(root, number)
    problems = []
    canonical = ""
    for path in (shard_path(root, number), index_path(root, number)):
        name = path.relative_to(root).as_posix()
        if not path.is_file():
            problems.append(f"{name}: missing; {_ADVICE}")
        elif sha256_of(path) != listed.get(name):
            problems.append(f"{name}: does not match its checksum; {_ADVICE}")
        canonical += f"{listed.get(name)}  {name}\n"
    if not sums.is_file() or sums.read_bytes() != canonical.encode():
        problems.append(f"{sums.relative_to(root)}: missing or damaged; {_ADVICE}")
    return problems or _structure_problems(root, number)


def _structure_problems(root: Path, number: int) -> list[str]:
    """What intact bytes can still have wrong: rows that point outside their shard."""
    part = f"index/{number:05d}.parquet"
    try:
        length = MappedShard(shard_path(root, number)).layouts["latents"].shape[0]
        rows = rows_from_table(read_table(index_path(root, number), part))
    except (StoreError, FileNotFoundError, KeyError) as error:
        return [f"shards/{number:05d}.safetensors: {error}; {_ADVICE}"]
    return [
        f"{part}: {row.key!r} lies outside its shard; {_ADVICE}"
        for row in rows
        if row.shard != number or row.start < 0 or row.start + row.length > length
    ]


def _rebuild_manifest(root: Path) -> list[str]:
    if _manifest_problem(root) is None:
        return []
    for path in sorted((root / "shards").glob("[0-9]*.safetensors"), reverse=True):
        try:
            text = MappedShard(path).metadata["manifest"]
            parse_manifest(text.encode(), str(path))
        except (HalfstepError, FileNotFoundError, KeyError):
            continue
        write_durably(root / MANIFEST_NAME, text.encode())
        return [MANIFEST_NAME]
    raise StoreError(f"{root}: the manifest is damaged and no shard has a copy; encode into a new folder")


def _trusted_table(root: Path, number: int) -> pa.Table | None:
    """The rows of a shard, from its index part or from the copy inside the shard, if either can be vouched for: by its
    checksum, by the two being equal, or by the checksum of the whole shard."""
    path, shard = index_path(root, number), shard_path(root, number)
    file = path.read_bytes() if path.is_file() else None
    embedded = _embedded_index(root, number)
    listed = _listed_checksums(root, number)
    for data in (file, embedded):
        if data is not None and hashlib.sha256(data).hexdigest() == listed.get(path.relative_to(root).as_posix()):
            return _table(data, number)
    if file is not None and file == embedded:
        return _table(file, number)
    if embedded is not None and sha256_of(shard) == listed.get(shard.relative_to(root).as_posix()):
        return _table(embedded, number)
    return None


def _table(data: bytes, number: int) -> pa.Table:
    return read_table(pa.BufferReader(data), f"index of shard {number:05d}")


def _embedded_index(root: Path, number: int) -> bytes | None:
    try:
        shard = MappedShard(shard_path(root, number))
        return shard.rows(INDEX_ARRAY, 0, shard.layouts[INDEX_ARRAY].shape[0]).tobytes()
    except (StoreError, FileNotFoundError, KeyError):
        return None


def _listed_checksums(root: Path, number: int) -> dict[str, str]:
    try:
        lines = checksum_path(root, number).read_text().splitlines()
    except (FileNotFoundError, UnicodeDecodeError):
        return {}
    return {name: digest for digest, _, name in (line.partition("  ") for line in lines)}


def _intact_rows(root: Path, number: int, rows: list[Row]) -> list[Row]:
    """The rows whose bytes match their checksums; none when the shard cannot be opened."""
    try:
        shard = MappedShard(shard_path(root, number))
    except (StoreError, FileNotFoundError):
        return []
    return [row for row in rows if _is_intact(shard, row)]


def _is_intact(shard: MappedShard, row: Row) -> bool:
    arrays = _row_arrays(shard, row)
    checksums = {
        (name, shard.layouts[name].type_name, values.shape[1:]): zlib.crc32(np.ascontiguousarray(values).data)
        for name, values in arrays.items()
    }
    complete = all(len(values) == row.length for values in arrays.values())
    return complete and sequence_checksum(checksums) == row.checksum


def _row_arrays(shard: MappedShard, row: Row) -> dict[str, Array]:
    names = [name for name in shard.layouts if name != INDEX_ARRAY]
    return {name: shard.rows(name, row.start, row.start + row.length) for name in names}
