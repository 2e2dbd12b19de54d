"""Streamed runs as pages ask for them: the report, a screenful of events, one frame with its peaks."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from halfstep.errors import InputError, StoreError
from halfstep.extras import missing
from halfstep.files import file_errors
from halfstep.web.guard import Refusal
from halfstep.web.view.pictures import Array, Kept, exposure, png
from halfstep.web.view.places import Shown, line_of, parse_json

_LONGEST = 1024  # pixels of a side of a frame that is shown
_MOST_PEAKS = 5000
_TABLES, _FRAMES = 8, 64 << 20
_LISTED = ("run", "source", "event", "sequence", "panels", "height", "width", "dtype", "n_peaks", "photon_energy_eV")


@dataclass(frozen=True)
class Part:
    """A table of events: how many it has, and how many of them with an image."""

    path: Path
    events: int
    images: int


class Streamed:
    """The streamed runs that are shown. Their tables are never changed once they are there."""

    def __init__(self, shown: Shown) -> None:
        self._shown = shown
        self._parts: Kept[Part] = Kept(100_000)
        self._tables: Kept[list[dict[str, Any]]] = Kept(_TABLES)
        self._frames: Kept[bytes] = Kept(_FRAMES, len)

    def facts(self, path: Path) -> dict[str, Any]:
        """The numbers of the report, and what the tables hold by now."""
        self._shown.require_inside(path, "events")
        problems: list[str] = []
        report: dict[str, Any] = {}
        try:
            found = parse_json(self._shown.file(path / "run.json").read_bytes())
            report = found if isinstance(found, dict) else {}
        except (OSError, ValueError) as error:
            problems.append(f"{path / 'run.json'}: cannot be read ({error})")
        parts, damaged = self._all_parts(path)
        problems += damaged
        letters = path / "dead_letters.jsonl"
        return {
            "report": {name: value for name, value in report.items() if name not in ("gaps", "sessions")},
            "sessions": _listed(report.get("sessions"))[-20:],
            "gaps": _listed(report.get("gaps"))[:20],
            "parts": len(parts),
            "events": sum(part.events for part in parts),
            "images": sum(part.images for part in parts),
            "dead_letters": letters.stat().st_size if letters.exists() else 0,
            "problems": problems,
        }

    def events(self, path: Path, start: int, count: int, *, images: bool) -> dict[str, Any]:
        """Events from number `start` on in the order of the tables, or only those with an image. Tables that hold none
        of them are not read."""
        parts, problems = self._all_parts(path)
        rows: list[dict[str, Any]] = []
        before = 0
        for part in parts:
            here = part.images if images else part.events
            if before + here > start and len(rows) < count:
                try:
                    listed = [row for row in self._table(part.path) if row["file"] is not None or not images]
                except StoreError as error:
                    problems.append(str(error))
                    listed = []
                rows += listed[max(0, start - before) : start - before + count][: count - len(rows)]
            before += here
        return {"matching": before, "rows": rows, "problems": problems}

    def event(self, path: Path, part: str, number: int) -> dict[str, Any]:
        """One event with its peaks [x, y, intensity] in pixels of the picture of its frame, whose panels lie one below
        the other."""
        row = self._row(path, part, number)
        peaks = self._read(self._part_path(path, part), [f"peak_{name}" for name in ("panel", "y", "x", "intensity")])
        panel, y, x, intensity = (peaks[name][number].as_py()[:_MOST_PEAKS] for name in peaks.column_names)
        places = [[px, py + row["height"] * p, i] for p, py, px, i in zip(panel, y, x, intensity, strict=True)]
        return {**row, "peaks": places, "size": [row["width"], row["height"] * row["panels"]]}

    def frame(self, path: Path, part: str, number: int) -> bytes:
        """The frame of an event with an image, as a PNG no longer than 1024 pixels."""
        row = self._row(path, part, number)
        if row["file"] is None:
            raise Refusal(f"event {row['event']!a}: its frame is in no file; hits alone are kept", 404)
        file = self._shown.file(path / row["file"])
        if not file.is_relative_to(path):
            raise Refusal(f"{row['file']!a}: leads out of the run")
        return self._frames.get((file, row["row"]), lambda: png(exposure(_image(file, row["row"]), _LONGEST)))

    def _row(self, path: Path, part: str, number: int) -> dict[str, Any]:
        rows = self._table(self._part_path(path, part))
        if not 0 <= number < len(rows):
            raise InputError(f"{part}: got event {number}; it has {len(rows)}")
        return rows[number]

    def _part_path(self, path: Path, part: str) -> Path:
        if not (part.isascii() and part.isdecimal()):
            raise InputError(f"part: got {part[:20]!r}; expected the number of a table in events")
        return self._shown.file(path / "events" / f"{part}.parquet")

    def _all_parts(self, path: Path) -> tuple[list[Part], list[str]]:
        """The tables in their order, and what is wrong with those that cannot be read."""
        parts, problems = [], []
        folder = path / "events"
        tables = [p for p in folder.glob("[0-9]*.parquet") if p.stem.isdecimal()] if folder.is_dir() else []
        for table in sorted(tables, key=lambda p: int(p.stem)):
            try:
                parts.append(self._parts.get((table, table.stat().st_mtime_ns), partial(self._part, table)))
            except (StoreError, OSError) as error:
                problems.append(line_of(error))
        return parts, problems

    def _part(self, table: Path) -> Part:
        self._shown.file(table)
        try:
            with table.open("rb") as file:
                facts = pq.ParquetFile(file, pre_buffer=False).metadata
                column = next(n for n in range(facts.num_columns) if facts.schema.column(n).path == "file")
                groups = [facts.row_group(n).column(column).statistics for n in range(facts.num_row_groups)]
        except (pa.ArrowException, OSError, ValueError, StopIteration) as error:
            raise StoreError(f"{table}: no readable table of events ({line_of(error)})") from error
        return Part(table, facts.num_rows, facts.num_rows - sum(group.null_count for group in groups))

    def _table(self, table: Path) -> list[dict[str, Any]]:
        """What is listed of each event of a table."""

        def read() -> list[dict[str, Any]]:
            columns = self._read(table, [*_LISTED, "retried_in_fp32", "file", "row"])
            return [{**row, "part": table.stem, "place": n} for n, row in enumerate(columns.to_pylist())]

        return self._tables.get((table, table.stat().st_mtime_ns), read)

    def _read(self, table: Path, columns: list[str]) -> pa.Table:
        self._shown.file(table)
        try:
            with file_errors(table), table.open("rb") as file:
                return pq.ParquetFile(file, pre_buffer=False).read(columns, use_threads=False)
        except (pa.ArrowException, ValueError) as error:
            raise StoreError(f"{table}: no readable table of events ({line_of(error)})") from error


def _listed(value: Any) -> list[dict[str, Any]]:
    """The objects of a list in a report, which somebody may have damaged."""
    return [entry for entry in value if isinstance(entry, dict)] if isinstance(value, list) else []


def _image(file: Path, row: int) -> Array:
    """An image of a CXI file, [panels * H, W]."""
    try:
        import h5py
        import hdf5plugin  # noqa: F401 - the filters of what is read
    except ImportError as error:
        raise missing(error, "stream") or error from error
    try:
        with h5py.File(file, "r") as opened:
            found: list[Any] = []
            opened.visititems(lambda _, item: found.append(item) if _is_image(item) else None)
            if not found:
                raise StoreError(f"{file}: holds no images")
            return np.asarray(found[0][row])
    except (OSError, ValueError, RuntimeError, IndexError) as error:
        raise StoreError(f"{file}: its image {row} cannot be read ({error})") from error


def _is_image(item: Any) -> bool:
    """Whether this is the data of hits: [n, H, W], wherever the run was told to put it."""
    return len(getattr(item, "shape", ())) == 3
