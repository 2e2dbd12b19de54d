"""The live panel of a streamed run on a terminal."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from rich.console import Console, RenderableType
from rich.live import Live
from rich.table import Table

from halfstep.progress import Progress

_REFRESHES_A_SECOND = 4


class Panel(Progress):
    """Events a second, latency, what waits, peaks; notes above it. Without a terminal, or `hidden`, notes alone."""

    def __init__(self, *, hidden: bool = False) -> None:
        self._console = Console(stderr=True)
        self._hidden = hidden or not self._console.is_terminal

    @contextmanager
    def showing(self, snapshot: Callable[[], Mapping[str, float]]) -> Iterator[None]:
        """Show what `snapshot` says, again and again, within the block."""
        if self._hidden:
            yield
            return
        live = Live(
            get_renderable=lambda: _table(snapshot()), console=self._console, refresh_per_second=_REFRESHES_A_SECOND
        )
        with live:
            yield

    def note(self, line: str) -> None:
        self._console.print(f"halfstep: {line}", highlight=False, soft_wrap=True, markup=False)


def _table(now: Mapping[str, float]) -> RenderableType:
    table = Table(box=None, pad_edge=False)
    cells = {
        "events/s": f"{now['events_per_second']:.1f}",
        "latency": f"{now['latency_ms']:.0f} ms",
        "queue": f"{now['queue_bytes'] / 1e6:.1f} MB",
        "peaks/s": f"{now['peaks'] / max(now['seconds'], 1e-3):.0f}",
        "out": f"{now['out']:.0f}",
        "under way": f"{now['leased']:.0f}",
        "refused": f"{now['refused']:.0f}",
        "dropped": f"{now['dropped']:.0f}",
    }
    for name in cells:
        table.add_column(name, justify="right", min_width=9)
    table.add_row(*cells.values())
    return table
