"""Look after a local store: verify every byte, repair what a crash or a bad disk left, drop what is dead."""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pyarrow as pa

from halfstep.errors import HalfstepError, StoreBusyError, StoreError
from halfstep.store.commit import FileLock, fsync_path, sha256_of, store_errors, write_durably
from halfstep.store.formats import Array, storage_of
from halfstep.store.index import (
    Row,
    checksum_path,
    committed_numbers,
    index_path,
    live_rows,
    read_rows,
    read_table,
    rows_from_table,
    shard_path,
)
from halfstep.store.manifest import NAME as MANIFEST_NAME
from halfstep.store.manifest import parse_manifest
from halfstep.store.shard import INDEX_ARRAY, MappedShard
from halfstep.store.writer import SHARD_BYTES, DatasetWriter, read_manifest, remove_leftovers, sequence_checksum


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
    if not (root / "index").is_dir() and not (root / MANIFEST_NAME).exists():
        raise StoreError(f"{root}: no store here; `halfstep encode -i SRC -o {root}` makes one")
    problems = [] if (problem := _manifest_problem(root)) is None else [problem]
    rows: list[Row] = []
    numbers = committed_numbers(root)
    for number in numbers:
        found = _shard_problems(root, number)
        problems += found
        if not found:
            rows += rows_from_table(read_table(index_path(root, number), str(number)))
    for path in sorted((root / "shards").glob("[0-9]*.safetensors")):
        if int(path.stem) not in numbers and not (root / "staging" / path.stem).exists():
            problems.append(
                f"index/{path.stem}.parquet: missing, though its shard is there; run `halfstep store repair`"
            )
    items = sum(row.length for row in live_rows(rows).values())
    return VerifyReport(len(numbers), items, problems)


def repair(root: Path | str) -> RepairReport:
    """Make the store at `root` whole again without its sources, losing only sequences whose own bytes are damaged.

    A damaged manifest or index part is rebuilt from the copies inside the shards; sequences of a damaged shard that
    still match their checksums move to a new shard. Encoding the same sources again brings back what was lost.
    """
    root = Path(root)
    with store_errors(root), _alone(root) as lock:
        remove_leftovers(root)
        rebuilt = _rebuild_manifest(root)
        lost: list[str] = []
        on_disk = {int(path.stem) for path in (root / "shards").iterdir() if path.stem.isdigit()}
        for number in sorted(on_disk | set(committed_numbers(root))):
            if not _shard_problems(root, number):
                continue
            index = _trusted_index(root, number)
            if index is None:
                lost.append(f"every sequence of shard {number:05d}")
                good = []
            else:
                rows = rows_from_table(read_table(pa.BufferReader(index), f"shard {number:05d}"))
                good = [row for row in rows if _is_intact(root, row)]
                lost += [row.key for row in rows if row not in good]
                rebuilt += [f"shard {number:05d}: {len(good)} of {len(rows)} sequences"] if good else []
            _move_rows(root, good, lock)
            _remove_shard(root, number)
    return RepairReport(rebuilt, lost)


def compact(root: Path | str, drop: Collection[str] = (), shard_bytes: int = SHARD_BYTES) -> int:
    """Remove the sequences `drop` and superseded ones, and merge small shards; return the number of items removed.

    What lives is committed in new shards before the old ones go, so a crash in between loses nothing. Raises
    StoreBusyError while another process writes the store.
    """
    root = Path(root)
    with store_errors(root), _alone(root) as lock:
        remove_leftovers(root)
        rows = read_rows(root)
        current = live_rows(rows)
        live = [row for key, row in current.items() if key not in drop]
        removed = sum(row.length for key, row in current.items() if key in drop)
        numbers = committed_numbers(root)
        kept = {id(row) for row in live}
        dead = {row.shard for row in rows if id(row) not in kept}
        small = {number for number in numbers if shard_path(root, number).stat().st_size < shard_bytes // 4}
        rewrite = dead | (small if len(small) > 1 else set())
        _move_rows(root, [row for row in live if row.shard in rewrite], lock, shard_bytes)
        for number in sorted(rewrite):
            _remove_shard(root, number)
    return removed


@contextmanager
def _alone(root: Path) -> Iterator[FileLock]:
    """Hold the writers' lock so that nobody else writes the store within the block."""
    lock = FileLock(root / ".writers.lock")
    try:
        if not lock.try_exclusive():
            raise StoreBusyError(
                f"{root}: is being written by another process; wait for it to end, then run the same command again"
            )
        yield lock
    finally:
        lock.release()


def _move_rows(root: Path, rows: list[Row], lock: FileLock, shard_bytes: int = SHARD_BYTES) -> None:
    """Copy sequences, bytes as they are, into new committed shards; one set of shards for each storage type."""
    manifest = read_manifest(root)
    shards: dict[int, MappedShard] = {row.shard: MappedShard(shard_path(root, row.shard)) for row in rows}
    by_storage: dict[str, list[Row]] = {}
    for row in sorted(rows, key=lambda row: row.key):
        storage = storage_of(shards[row.shard].layouts["latents"].type_name)
        by_storage.setdefault(storage, []).append(row)
    for storage, group in by_storage.items():
        with DatasetWriter(root, replace(manifest, storage=storage), shard_bytes=shard_bytes, lock=lock) as writer:
            for row in group:
                writer.extend(**_row_arrays(shards[row.shard], row))
                writer.finish(
                    row.key,
                    label=row.label,
                    fingerprint=row.fingerprint,
                    digests=row.digests,
                    attributes=row.attributes,
                )


def _remove_shard(root: Path, number: int) -> None:
    """The index part goes first: without it the rest is no longer part of the store, whatever happens next."""
    (root / "staging" / f"{number:05d}").mkdir(exist_ok=True)  # marks what follows as leftovers until it is done
    index_path(root, number).unlink(missing_ok=True)
    fsync_path(root / "index")
    shard_path(root, number).unlink(missing_ok=True)
    checksum_path(root, number).unlink(missing_ok=True)
    (root / "staging" / f"{number:05d}").rmdir()


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
    advice = "run `halfstep store repair`"
    sums = checksum_path(root, number)
    listed = _listed_checksums(root, number)
    problems = []
    canonical = ""
    for path in (shard_path(root, number), index_path(root, number)):
        name = path.relative_to(root).as_posix()
        if not path.is_file():
            problems.append(f"{name}: missing; {advice}")
        elif sha256_of(path) != listed.get(name):
            problems.append(f"{name}: does not match its checksum; {advice}")
        canonical += f"{listed.get(name)}  {name}\n"
    if not sums.is_file() or sums.read_bytes() != canonical.encode():
        problems.append(f"{sums.relative_to(root)}: missing or damaged; {advice}")
    return problems or _structure_problems(root, number)


def _structure_problems(root: Path, number: int) -> list[str]:
    """What intact bytes can still have wrong: rows that point outside their shard."""
    shard = MappedShard(shard_path(root, number))
    length = shard.layouts["latents"].shape[0]
    rows = rows_from_table(read_table(index_path(root, number), str(number)))
    return [
        f"index/{number:05d}.parquet: {row.key!r} lies outside its shard; run `halfstep store repair`"
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
        except (HalfstepError, KeyError):
            continue
        write_durably(root / MANIFEST_NAME, text.encode())
        return [MANIFEST_NAME]
    raise StoreError(f"{root}: the manifest is damaged and no shard has a copy; encode into a new folder")


def _trusted_index(root: Path, number: int) -> bytes | None:
    """The bytes of a shard's index part, from its file or from the copy inside the shard, if either can be vouched for:
    by its checksum, by the two being equal, or by the checksum of the whole shard."""
    file = index_path(root, number).read_bytes() if index_path(root, number).is_file() else None
    embedded = _embedded_index(root, number)
    listed = _listed_checksums(root, number)
    vouched = listed.get(index_path(root, number).relative_to(root).as_posix())
    for data in (file, embedded):
        if data is not None and hashlib.sha256(data).hexdigest() == vouched:
            return data
    if file is not None and file == embedded:
        return file
    shard = shard_path(root, number)
    if embedded is not None and sha256_of(shard) == listed.get(shard.relative_to(root).as_posix()):
        return embedded
    return None


def _embedded_index(root: Path, number: int) -> bytes | None:
    try:
        shard = MappedShard(shard_path(root, number))
        return shard.rows(INDEX_ARRAY, 0, shard.layouts[INDEX_ARRAY].shape[0]).tobytes()
    except (StoreError, KeyError):
        return None


def _listed_checksums(root: Path, number: int) -> dict[str, str]:
    try:
        lines = checksum_path(root, number).read_text().splitlines()
    except (FileNotFoundError, UnicodeDecodeError):
        return {}
    return {name: digest for digest, _, name in (line.partition("  ") for line in lines)}


def _is_intact(root: Path, row: Row) -> bool:
    try:
        shard = MappedShard(shard_path(root, row.shard))
        arrays = _row_arrays(shard, row)
    except (StoreError, KeyError):
        return False
    checksums = {
        (name, shard.layouts[name].type_name, values.shape[1:]): zlib.crc32(np.ascontiguousarray(values).data)
        for name, values in arrays.items()
    }
    complete = all(len(values) == row.length for values in arrays.values())
    return complete and sequence_checksum(checksums) == row.checksum


def _row_arrays(shard: MappedShard, row: Row) -> dict[str, Array]:
    names = [name for name in shard.layouts if name != INDEX_ARRAY]
    return {name: shard.rows(name, row.start, row.start + row.length) for name in names}
