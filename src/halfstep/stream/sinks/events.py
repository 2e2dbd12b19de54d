"""Tables of events as Parquet: a row for every event, hit or not. The table is what says that a part is committed.

Columns: who it is (`run`, `source`, `event`, `sequence`); what it is (`panels`, `height`, `width` in pixels, `dtype`);
its peaks as lists side by side (`n_peaks`; `peak_panel`, `peak_y`, `peak_x` in pixels of a panel, `peak_intensity` in
the wire's values), which pandas gives as arrays and polars explodes together; what was sent with it (`timestamp` if it
was sent as a float, `timestamp_uint64` if as a whole number, `photon_energy_eV`, and `facts`, the others as JSON); what
came of it (`retried_in_fp32`, `crc32c` of its data, `received` in seconds since 1970, `network`); and the `file`
and `row` of its image, null where it is in none.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

import halfstep
from halfstep.errors import StoreError
from halfstep.files import file_errors
from halfstep.stream.events import Fact, Identity, Result
from halfstep.stream.sinks.facts import check_identity, photon_energy, timestamps

_FORMAT = b"halfstep.events"
_VERSION = b"1"
_CHECKSUM = b"halfstep.crc32c"
_SEEN = [*Identity._fields, "crc32c"]
_SHAPE = ("panels", "height", "width")
_REPEATED = ["run", "source", "dtype", "network", "file"]  # a dictionary of the others is as long as they are
_OUTCOME = ("retried_in_fp32", "crc32c", "received", "network", "file", "row")


def _present(name: str, kind: Any) -> Any:
    return pa.field(name, kind, nullable=False)


_SCHEMA = pa.schema(
    [
        _present("run", pa.string()),
        _present("source", pa.string()),
        _present("event", pa.string()),
        _present("sequence", pa.int64()),
        _present("panels", pa.int32()),
        _present("height", pa.int32()),
        _present("width", pa.int32()),
        _present("dtype", pa.string()),
        _present("n_peaks", pa.int32()),
        _present("peak_panel", pa.list_(pa.int32())),
        _present("peak_y", pa.list_(pa.float32())),
        _present("peak_x", pa.list_(pa.float32())),
        _present("peak_intensity", pa.list_(pa.float32())),
        ("timestamp", pa.float64()),
        ("timestamp_uint64", pa.uint64()),
        ("photon_energy_eV", pa.float64()),
        _present("facts", pa.string()),
        _present("retried_in_fp32", pa.bool_()),
        _present("crc32c", pa.uint32()),
        _present("received", pa.float64()),
        _present("network", pa.string()),
        ("file", pa.string()),
        ("row", pa.int32()),
    ],
    {_FORMAT: _VERSION, b"halfstep": halfstep.__version__.encode()},
)


@dataclass(frozen=True)
class EventRow:
    """A result, and what became of it: whether it was computed again in fp32, the CRC-32C of its data as received, when
    that was in seconds since 1970, which network it went through in which precision, and where its image is: `row` of
    the data in `file`, None where it is in none."""

    result: Result
    retried_in_fp32: bool
    crc32c: int
    received: float
    network: str = ""
    file: str | None = None
    row: int | None = None


def write_events(path: Path, rows: Sequence[EventRow]) -> None:
    """Write a row for each event to a new file. Raises InputError, before anything is written, for an identity that
    cannot be stored; FileError when the system could not write."""
    for row in rows:
        check_identity(row.result.event.identity)
    sink = pa.BufferOutputStream()
    table = _table(rows)
    table = table.replace_schema_metadata({**_SCHEMA.metadata, _CHECKSUM: _checksum(table)})
    pq.write_table(table, sink, compression="zstd", use_dictionary=_REPEATED, write_page_checksum=True)
    with file_errors(path):
        path.write_bytes(sink.getvalue())


def read_events_seen(path: Path) -> list[tuple[Identity, int]]:
    """Which events a table holds, in its order, and the CRC-32C of the data of each; nothing else is read. Raises
    StoreError for a damaged table and FileError for one that cannot be opened."""
    table = _read(path, _SEEN)
    lines = zip(*(column.to_pylist() for column in table.columns), strict=True)
    return [(Identity(*identity), crc32c) for *identity, crc32c in lines]


def read_identities(path: Path) -> list[Identity]:
    """The same without the checksums."""
    return [identity for identity, _ in read_events_seen(path)]


def read_events(path: Path) -> pa.Table:
    """A table of events. Raises StoreError for a damaged one and FileError for one that cannot be opened."""
    return _read(path, _SCHEMA.names)


def _table(rows: Sequence[EventRow]) -> pa.Table:
    results = [row.result for row in rows]
    events = [result.event for result in results]
    stamps = [timestamps(event.facts) for event in events]
    peaks = np.concatenate([np.empty((0, 3), np.float32), *(result.peaks for result in results)])
    intensities = np.concatenate([np.empty(0, np.float32), *(result.intensities for result in results)])
    counts = [len(result.peaks) for result in results]
    starts = pa.array(np.cumsum([0, *counts]), pa.int32())

    def lists(values: Any, kind: Any) -> Any:
        return pa.ListArray.from_arrays(starts, pa.array(values, kind))

    columns: dict[str, Any] = {
        **{name: [getattr(event.identity, name) for event in events] for name in Identity._fields},
        **{name: [event.data.shape[axis] for event in events] for axis, name in enumerate(_SHAPE)},
        "dtype": [str(event.data.dtype) for event in events],
        "n_peaks": counts,
        "peak_panel": lists(peaks[:, 0].astype(np.int32), pa.int32()),
        "peak_y": lists(peaks[:, 1], pa.float32()),
        "peak_x": lists(peaks[:, 2], pa.float32()),
        "peak_intensity": lists(intensities, pa.float32()),
        "timestamp": [stamp for stamp, _ in stamps],
        "timestamp_uint64": [stamp for _, stamp in stamps],
        "photon_energy_eV": [photon_energy(event.facts) for event in events],
        "facts": [_others(event.facts) for event in events],
        **{name: [getattr(row, name) for row in rows] for name in _OUTCOME},
    }
    return pa.table(columns, schema=_SCHEMA)


def _others(facts: Mapping[str, Fact]) -> str:
    """As JSON, the facts that have no column, and those whose column cannot hold what was sent. Numbers that are not
    finite are text: JSON has none."""
    held = set()
    if timestamps(facts) != (None, None):
        held.add("timestamp")
    if photon_energy(facts) is not None:
        held.add("photon_energy_eV")
    rest = {name: value for name, value in facts.items() if name not in held}
    return json.dumps(
        {name: str(v) if isinstance(v, float) and not math.isfinite(v) else v for name, v in rest.items()}
    )


def _checksum(table: pa.Table) -> bytes:
    """Of who is in the table: a restart goes by that, and pages have checksums, but the number of rows has none."""
    return b"%08x" % google_crc32c.value(json.dumps(table.select(_SEEN).to_pydict()).encode())


def _read(path: Path, columns: list[str]) -> pa.Table:
    with file_errors(path):
        source = pa.BufferReader(path.read_bytes())  # opened by Python: Arrow refuses names that are not UTF-8
    try:
        # In this thread alone: one of Arrow's that lets go of Python's memory while the interpreter ends aborts it.
        file = pq.ParquetFile(source, pre_buffer=False, page_checksum_verification=True)
        facts = file.schema_arrow.metadata or {}
        version = facts.get(_FORMAT, _VERSION)
        if version == _VERSION:
            if not file.schema_arrow.equals(_SCHEMA):
                raise ValueError("columns of other names or types")
            table = file.read(columns, use_threads=False)
            table.validate(full=True)
            if _checksum(table) != facts.get(_CHECKSUM):
                raise ValueError("its events do not match their checksum")
            return table
    except (pa.ArrowException, OSError, ValueError) as error:
        what = str(error).splitlines()[0]
        raise StoreError(
            f"{path}: no readable table of events ({what}); move it away: its events then count as never committed"
        ) from error
    raise StoreError(f"{path}: is of format {version.decode(errors='replace')}; expected 1; use a newer halfstep")
