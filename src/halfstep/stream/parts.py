"""Parts: what a run has committed. A part is up to a hundred events in a few files of one number; its table of events
is written last and makes it count.

    events/000012.parquet   the record: identities, peaks, facts of every event
    cxi/PREFIX_000012.cxi   the hits
    masks/000012.h5         the masks, where they are asked for

A CXI or mask file whose number has no table is from a run that was killed in between. Nothing in it was acknowledged.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from halfstep.files import file_errors, is_unfinished, replacing
from halfstep.stream.seen import Seen
from halfstep.stream.sinks.cxi import CxiSettings, is_hit, write_cxi
from halfstep.stream.sinks.events import EventRow, read_events_seen, write_events
from halfstep.stream.sinks.masks import write_masks

EVENTS = "events"
_NUMBER = re.compile(r"(\d{6,})\.(parquet|cxi|h5)$")


@dataclass(frozen=True)
class Outputs:
    """The files of a run. `cxi=None` writes no CXI files."""

    folder: Path
    cxi: CxiSettings | None
    prefix: str = "peaks"
    masks: bool = False


class Parts:
    """Commits parts into a folder, which this process holds alone."""

    def __init__(self, outputs: Outputs) -> None:
        self._outputs = outputs
        with file_errors(outputs.folder):
            (outputs.folder / EVENTS).mkdir(parents=True, exist_ok=True)
            committed = {_number(path) for path in (outputs.folder / EVENTS).iterdir() if _number(path) is not None}
            for name in (EVENTS, "cxi", "masks"):
                for path in (outputs.folder / name).glob("*"):
                    if is_unfinished(path) or (_number(path) is not None and _number(path) not in committed):
                        path.unlink()
        self._next = max((number for number in committed if number is not None), default=-1) + 1

    def seen(self) -> Seen:
        """What all parts hold, read back."""
        seen = Seen()
        for path in sorted((self._outputs.folder / EVENTS).glob("*.parquet")):
            for identity, crc in read_events_seen(path):
                seen.commit(identity, crc)
        return seen

    def commit(self, rows: Sequence[EventRow]) -> int:
        """Write one part; when this returns it survives a crash. Returns its bytes. Raises FileError, and leaves no
        part, when a file cannot be written."""
        name = f"{self._next:06d}"
        record = self._folder(EVENTS) / f"{name}.parquet"
        written: list[Path] = []
        try:
            if self._outputs.cxi is not None:
                rows = self._write_cxi(rows, name, written)
            if self._outputs.masks:
                path = self._folder("masks") / f"{name}.h5"
                written.append(path)
                with replacing(path) as temporary:
                    write_masks(temporary, [row.result for row in rows])
            written.append(record)
            with replacing(record) as temporary:
                write_events(temporary, rows)
        except BaseException:
            # The record first, which may be there when its folder could not be synced: it must not outlive the rest.
            for path in reversed(written):
                with suppress(OSError):  # the error that led here is told; a rest is removed at the next start
                    path.unlink(missing_ok=True)
            raise
        self._next += 1
        return sum(path.stat().st_size for path in written)

    def _write_cxi(self, rows: Sequence[EventRow], name: str, written: list[Path]) -> list[EventRow]:
        """Rows that know where their images are."""
        settings = self._outputs.cxi
        assert settings is not None
        hits = [place for place, row in enumerate(rows) if is_hit(row.result, settings)]
        if not hits:
            return list(rows)
        path = self._folder("cxi") / f"{self._outputs.prefix}_{name}.cxi"
        written.append(path)
        with replacing(path) as temporary:
            write_cxi(temporary, [rows[place].result for place in hits], settings)
        places = {place: row for row, place in enumerate(hits)}
        file = str(path.relative_to(self._outputs.folder))
        return [
            replace(row, file=file, row=places[place]) if place in places else row for place, row in enumerate(rows)
        ]

    def _folder(self, name: str) -> Path:
        folder = self._outputs.folder / name
        with file_errors(folder):
            folder.mkdir(exist_ok=True)
        return folder


def _number(path: Path) -> int | None:
    found = _NUMBER.search(path.name)
    return int(found[1]) if found and not path.name.startswith(".") else None
