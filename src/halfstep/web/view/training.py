"""Training runs as pages ask for them: the settings, and of log.jsonl what is new."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from halfstep.errors import StoreError
from halfstep.files import file_errors
from halfstep.web.view.places import Shown, parse_json

LOG = "log.jsonl"
CURVES = ("loss", "grad_norm", "loss_scale", "samples_per_second", "lr", "skipped", "memory_mb")
_MOST_BYTES = 4 << 20  # of the log that are read for one answer; the page asks again for the rest


class Training:
    """The training runs that are shown."""

    def __init__(self, shown: Shown) -> None:
        self._shown = shown

    def facts(self, path: Path) -> dict[str, Any]:
        """How the run was set up, and its checkpoints."""
        config = self._shown.file(path / "config.json")
        with file_errors(config):
            data = config.read_bytes()
        try:
            settings = parse_json(data)
        except ValueError as error:
            raise StoreError(f"{config}: is damaged ({error}); its log is shown all the same") from error
        if not isinstance(settings, dict):
            raise StoreError(f"{config}: is damaged (no JSON object); its log is shown all the same")
        folder = path / "checkpoints"
        names = sorted(p.name for p in folder.glob("[0-9]*")) if folder.is_dir() else []
        return {"settings": settings, "checkpoints": len(names), "newest": names[-1] if names else None}

    def log(self, path: Path, start: int, file: str) -> dict[str, Any]:
        """The whole lines of the log from byte `start` on, as columns, and the byte to go on from. `file` is what the
        answer before called the log; where it is another one since, as when a run went on from an earlier step,
        `again` says that all that was told is void. Lines that cannot be read are counted."""
        log = self._shown.file(path / LOG)
        with file_errors(log), log.open("rb") as opened:
            name = str(log.stat().st_ino)
            size = opened.seek(0, 2)
            again = bool(file) and (file != name or start > size)
            at = 0 if again else start
            opened.seek(at)
            data = opened.read(_MOST_BYTES)
        whole = data.rfind(b"\n") + 1  # the last line may be half written
        columns: dict[str, list[Any]] = {name: [] for name in ("step", *CURVES)}
        unreadable, newest = 0, None
        for line in data[:whole].splitlines():
            record = _record(line)
            if record is None:
                unreadable += 1
                continue
            newest = record
            for column, values in columns.items():
                values.append(_number(record.get(column)))
        return {
            "file": name,
            "next": at + whole,
            "size": size,
            "again": again,
            "columns": columns,
            "unreadable": unreadable,
            "newest": newest,
        }


def _record(line: bytes) -> dict[str, Any] | None:
    try:
        record = parse_json(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) and isinstance(record.get("step"), int) else None


def _number(value: Any) -> float | int | None:
    return value if isinstance(value, (int, float)) and not isinstance(value, bool) else None
