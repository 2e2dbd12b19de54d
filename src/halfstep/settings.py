"""What differs from last time: the settings that a folder was made with, against those of now."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from halfstep.errors import InputError


def differences(before: Mapping[str, Any], now: Mapping[str, Any], may_differ: Collection[str] = ()) -> list[str]:
    """A line `name: was X, is Y` for every setting of `now` that was another one `before`, inner ones by dotted names.
    Those named in `may_differ`, with all that is in them, do not count; nor does what `now` no longer has."""
    return _differences(before, now, frozenset(may_differ), "")


def require_same(
    where: Path | str,
    what: str,
    before: Mapping[str, Any],
    now: Mapping[str, Any],
    *,
    may_differ: Collection[str] = (),
    advice: str,
) -> None:
    """Raise InputError, naming what differs, when `where` holds a `what` that was made with other settings."""
    if lines := differences(before, now, may_differ):
        raise InputError(f"{where}: holds a {what} with other settings ({'; '.join(lines)}); {advice}")


def _differences(before: Any, now: Any, may_differ: frozenset[str], place: str) -> list[str]:
    if place in may_differ:
        return []
    if isinstance(now, Mapping) and isinstance(before, Mapping):
        inner = ((before.get(name), value, f"{place}.{name}" if place else name) for name, value in now.items())
        return [line for was, value, at in inner for line in _differences(was, value, may_differ, at)]
    return [] if before == now else [f"{place}: was {before!r}, is {now!r}"]
