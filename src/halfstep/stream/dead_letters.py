"""Dead letters: what could not be used, by name and reason, with the bytes that came as far as there is room.

`dead_letters.jsonl` has a line for each: when, where from, which event, why, and `offset` and `length` of its bytes in
`dead_letters.bin`. Beyond `most_bytes` only the line is kept.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from halfstep.errors import printable
from halfstep.files import file_errors
from halfstep.stream.events import Identity

MOST_BYTES = 1 << 30


@dataclass(frozen=True)
class Loss:
    """A message or event that did not come out. `identity` is None where it could not be read."""

    kind: Literal["refused", "dropped"]
    reason: str
    origin: str = ""
    identity: Identity | None = None
    raw: bytes | memoryview = b""


class DeadLetters:
    """The two files in `folder`, made with the first letter; safe to add to from one thread at a time."""

    def __init__(self, folder: Path, most_bytes: int = MOST_BYTES) -> None:
        self._lines, self._bytes = folder / "dead_letters.jsonl", folder / "dead_letters.bin"
        self._most_bytes = most_bytes

    def add(self, loss: Loss) -> None:
        """When this returns, it survives a crash."""
        with file_errors(self._lines):
            there = self._bytes.stat().st_size if self._bytes.exists() else 0
            entry = {
                "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
                "kind": loss.kind,
                "reason": printable(loss.reason),
                "origin": loss.origin,
                "identity": loss.identity._asdict() if loss.identity is not None else None,
                "size": len(loss.raw),
            }
            if len(loss.raw) and there + len(loss.raw) <= self._most_bytes:
                _append(self._bytes, loss.raw)
                entry |= {"offset": there, "length": len(loss.raw)}
            _append(self._lines, json.dumps(entry).encode() + b"\n")


def _append(path: Path, data: bytes | memoryview) -> None:
    with path.open("ab", buffering=0) as file:
        view = memoryview(data)
        while view:
            view = view[file.write(view) :]
        os.fsync(file.fileno())
