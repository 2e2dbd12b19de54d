"""How long work goes, for whoever wants to know: one protocol, silent by default."""

from __future__ import annotations


class Progress:
    """Told how work goes; this one keeps silent. Units are whatever the work counts: items, steps, parts."""

    def start(self, total: int | None, done: int = 0) -> None:
        """Work of `total` units begins, `done` of them from an earlier call; None when nobody knows how many."""

    def advance(self, units: int = 1, *, written: int = 0) -> None:
        """`units` more are done, and `written` bytes of results with them."""

    def show(self, line: str) -> None:
        """What is newest, in place of what was shown before."""

    def note(self, line: str) -> None:
        """Something the user should know."""


SILENT = Progress()
