"""The progress of long verbs on a terminal: one bar on stderr."""

from __future__ import annotations

from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress

from halfstep.progress import Progress
from halfstep.team import rank


class Bar(Progress):
    """Units done of all, units a second, MB written, and what is newest; without a terminal the newest lines alone, one
    below the other. Under torchrun only the first process shows its own share, and only it `speaks`. `hidden`: notes
    alone."""

    def __init__(self, description: str, unit: str, *, hidden: bool = False) -> None:
        self.speaks = rank() == 0
        self._console = Console(stderr=True)
        self._hidden = hidden or not self.speaks
        self._bar = RichProgress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}{task.fields[written]}{task.fields[newest]}"),
            TimeRemainingColumn(),
            console=self._console,
            disable=self._hidden or not self._console.is_terminal,
        )
        self._unit, self._bytes = unit, 0
        self._task = self._bar.add_task(description, total=None, rate="", written="", newest="")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, _: type[BaseException] | None, __: BaseException | None, ___: TracebackType | None) -> None:
        self._bar.stop()

    def start(self, total: int | None, done: int = 0) -> None:
        self._bar.update(self._task, total=total, completed=done)
        self._bar.start()

    def advance(self, units: int = 1, *, written: int = 0) -> None:
        self._bytes += written
        rate = f"{self._bar.tasks[0].speed or 0.0:.1f} {self._unit}/s"
        told = f"  {self._bytes / 1e6:.1f} MB" if self._bytes else ""
        self._bar.update(self._task, advance=units, rate=rate, written=told)

    def show(self, line: str) -> None:
        if self._console.is_terminal:
            self._bar.update(self._task, newest=f"  {line}")
        elif not self._hidden:
            self._print(line)

    def note(self, line: str) -> None:
        if self.speaks:
            self._print(f"halfstep: {line}")

    def _print(self, line: str) -> None:
        self._console.print(line, highlight=False, soft_wrap=True, markup=False)
