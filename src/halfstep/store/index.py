"""Index parts: one parquet row a sequence, and the checksum file that makes a shard verifiable."""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from halfstep.errors import StoreError

DIGEST_BYTES = 16

INDEX_SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("shard", pa.int32()),
        ("start", pa.int64()),
        ("length", pa.int32()),
        ("label", pa.string()),
        ("fingerprint", pa.binary(DIGEST_BYTES)),
        ("digests", pa.binary()),
        ("checksum", pa.uint32()),
        ("attributes", pa.string()),
    ]
)
READING_COLUMNS = ["key", "shard", "start", "length", "label", "checksum"]

# An empty file of this name and a number says that shards up to it were removed. A number is never used again: a reader
# that opened the store before would take the new shard for the old one.
REMOVED_MARK = ".removed-"


@dataclass(frozen=True, slots=True)
class Row:
    """One sequence of a store: items [start, start + length) of a shard.

    `fingerprint` says what it was made from; `digests` are those of its single frames, DIGEST_BYTES each, where frames
    can be told apart; `checksum` is `sequence_checksum` of its arrays.
    """

    key: str
    shard: int
    start: int
    length: int
    label: str | None = None
    fingerprint: bytes = bytes(DIGEST_BYTES)
    digests: bytes = b""
    checksum: int = 0
    attributes: dict[str, Any] = field(default_factory=dict)


def shard_path(root: Path, number: int) -> Path:
    return root / "shards" / f"{number:05d}.safetensors"


def index_path(root: Path, number: int) -> Path:
    return root / "index" / f"{number:05d}.parquet"


def checksum_path(root: Path, number: int) -> Path:
    """A file in the format of `sha256sum`, so that `cd STORE && sha256sum -c index/*.sha256` works without halfstep."""
    return root / "index" / f"{number:05d}.sha256"


def used_numbers(root: Path) -> set[int]:
    """Every shard number that any file of the store has, committed or not, and the last one that was removed."""
    numbers = {int(p.stem) for name in ("shards", "index", "staging") for p in (root / name).glob("[0-9]*")}
    return numbers | {int(path.name.removeprefix(REMOVED_MARK)) for path in root.glob(f"{REMOVED_MARK}*")}


def committed_numbers(root: Path) -> list[int]:
    """The numbers of the committed shards, in order: those whose index part exists."""
    return sorted(int(path.stem) for path in (root / "index").glob("[0-9]*.parquet"))


def rows_to_bytes(rows: Iterable[Row]) -> bytes:
    """The index part of one shard as parquet."""
    listed = list(rows)
    columns = {name: [getattr(row, name) for row in listed] for name in INDEX_SCHEMA.names}
    columns["attributes"] = [json.dumps(attributes) for attributes in columns["attributes"]]
    buffer = io.BytesIO()
    pq.write_table(pa.table(columns, schema=INDEX_SCHEMA), buffer, compression="zstd")
    return buffer.getvalue()


def read_table(source: Any, where: str, columns: list[str] | None = None) -> pa.Table:
    """An index part as an Arrow table. Raises StoreError when it is damaged, FileNotFoundError when it is gone."""
    try:
        if isinstance(source, Path):  # opened by Python: Arrow refuses names that are not UTF-8
            source = pa.BufferReader(source.read_bytes())
        # In this thread alone: one of Arrow's that lets go of Python's memory while the interpreter ends aborts it.
        return pq.ParquetFile(source, pre_buffer=False).read(columns, use_threads=False)
    except FileNotFoundError:
        raise
    except (pa.ArrowException, OSError, ValueError) as error:
        raise StoreError(f"{where}: damaged index ({error}); run `halfstep store repair`") from error


def rows_from_table(table: pa.Table) -> list[Row]:
    return [Row(**{**record, "attributes": json.loads(record["attributes"])}) for record in table.to_pylist()]


class Index(Mapping[str, Row]):
    """The live row of every key of a local store: where a key was written again, the one in the later shard.

    Kept as Arrow columns, a Row is made when it is asked for: a store may have millions.
    """

    def __init__(self, parts: Iterable[pa.Table] = ()) -> None:
        self._table = pa.concat_tables([INDEX_SCHEMA.empty_table(), *parts]).combine_chunks()
        self._columns = {name: self._table[name].combine_chunks() for name in self._table.column_names}
        self._row_of = {key: row for row, key in enumerate(self._columns["key"].to_pylist())}

    @classmethod
    def read(cls, root: Path) -> Index:
        """The index of the store at `root`; empty when there is none. Raises StoreError when it is damaged."""
        paths = (index_path(root, number) for number in committed_numbers(root))
        return cls(read_table(path, str(path)) for path in paths)

    def __getitem__(self, key: str) -> Row:
        values = {name: column[self._row_of[key]].as_py() for name, column in self._columns.items()}
        return Row(**{**values, "attributes": json.loads(values["attributes"])})

    def __iter__(self) -> Iterator[str]:
        return iter(self._row_of)

    def __len__(self) -> int:
        return len(self._row_of)

    def items_in(self, keys: Iterable[str]) -> int:
        """The number of items (frames) of some sequences."""
        lengths = self._columns["length"]
        return sum(lengths[self._row_of[key]].as_py() for key in keys)

    def shard_of(self, key: str) -> int:
        """The number of the shard that holds a sequence."""
        number: int = self._columns["shard"][self._row_of[key]].as_py()
        return number

    def dead_shards(self) -> set[int]:
        """Shards with rows that a later shard supersedes."""
        live = set(self._row_of.values())
        return {n for row, n in enumerate(self._columns["shard"].to_pylist()) if row not in live}

    def __getstate__(self) -> pa.Table:
        return self._table

    def __setstate__(self, table: pa.Table) -> None:
        self.__init__([table])  # type: ignore[misc]
