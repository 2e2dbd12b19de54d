"""Index parts: one parquet row a sequence, and the checksum file that makes a shard verifiable."""

from __future__ import annotations

import io
import json
from collections.abc import Iterable
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
READING_COLUMNS = ["key", "shard", "start", "length", "label"]


@dataclass(frozen=True)
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


def committed_numbers(root: Path) -> list[int]:
    """The numbers of the committed shards, in order: those whose index part exists."""
    return sorted(int(path.stem) for path in (root / "index").glob("[0-9]*.parquet"))


def rows_to_bytes(rows: Iterable[Row]) -> bytes:
    """The index part of one shard as parquet."""
    records = [{**vars(row), "attributes": json.dumps(row.attributes)} for row in rows]
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(records, schema=INDEX_SCHEMA), buffer, compression="zstd")
    return buffer.getvalue()


def read_table(source: Any, where: str, columns: list[str] | None = None) -> pa.Table:
    """An index part as an Arrow table. Raises StoreError when it is damaged, FileNotFoundError when it is gone."""
    try:
        return pq.read_table(source, columns=columns, partitioning=None)
    except FileNotFoundError:
        raise
    except (pa.ArrowException, OSError, ValueError) as error:
        raise StoreError(f"{where}: damaged index ({error}); run `halfstep store repair`") from error


def rows_from_table(table: pa.Table) -> list[Row]:
    return [Row(**{**record, "attributes": json.loads(record["attributes"])}) for record in table.to_pylist()]


def read_rows(root: Path) -> list[Row]:
    """All rows of a local store, later shards last."""
    return [
        row
        for number in committed_numbers(root)
        for row in rows_from_table(read_table(index_path(root, number), str(index_path(root, number))))
    ]


def live_rows(rows: Iterable[Row]) -> dict[str, Row]:
    """The row that counts for each key: a later shard supersedes an earlier one."""
    return {row.key: row for row in sorted(rows, key=lambda row: row.shard)}
