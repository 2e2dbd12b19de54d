"""The progress bars of long verbs, on stderr."""

from __future__ import annotations

import os
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress

from halfstep.encode import Progress
from halfstep.generate.makers import Progress as SamplingProgress
from halfstep.train.loop import Progress as TrainingProgress

_STALLED = 0.5  # of the updates of an average: more than this are lost to rounding


class BarProgress(Progress):
    """Items done of all, items a second, bytes written, time left. Under torchrun only the first process shows its own
    share, and only it `speaks` at the end."""

    def __init__(self, *, hidden: bool = False) -> None:
        self.speaks = os.environ.get("RANK", "0") == "0"
        console = Console(stderr=True)
        self._bar = RichProgress(
            TextColumn("encoding"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]:.1f} items/s"),
            TextColumn("{task.fields[megabytes]:.1f} MB"),
            TimeRemainingColumn(),
            console=console,
            disable=hidden or not self.speaks or not console.is_terminal,
        )
        self._bytes = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, _: type[BaseException] | None, __: BaseException | None, ___: TracebackType | None) -> None:
        self._bar.stop()

    def note(self, line: str) -> None:
        if self.speaks:
            self._bar.console.print(f"halfstep: {line}", highlight=False, soft_wrap=True)

    def start(self, items: int) -> None:
        self._task = self._bar.add_task("encoding", total=items or None, rate=0.0, megabytes=0.0)
        self._bar.start()

    def advance(self, items: int, latent_bytes: int) -> None:
        self._bytes += latent_bytes
        task = self._bar.tasks[0]
        self._bar.update(self._task, advance=items, rate=task.speed or 0.0, megabytes=self._bytes / 1e6)


class StepProgress:
    """Sampling steps done of all runs, time left, and a line for each run that is done."""

    def __init__(self, runs: int, *, hidden: bool = False) -> None:
        self._runs = runs
        self._seen: dict[str, int] = {}
        self._hidden = hidden
        console = Console(stderr=True)
        self._bar = RichProgress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("steps"),
            TimeRemainingColumn(),
            console=console,
            disable=hidden or not console.is_terminal,
        )
        self._task = self._bar.add_task("generating", total=None)

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(self, _: type[BaseException] | None, __: BaseException | None, ___: TracebackType | None) -> None:
        self._bar.stop()

    def note(self, line: str) -> None:
        if not self._hidden:
            self._bar.console.print(f"halfstep: {line}", highlight=False, soft_wrap=True, markup=False)

    def step(self, run: str, step: int, steps: int) -> None:
        self._seen[run] = step
        done = sum(self._seen.values())
        self._bar.update(self._task, description=run, completed=done, total=steps * self._runs)


class TrainProgress(TrainingProgress):
    """Training steps done, time left, the newest loss and rate; without a terminal a line for each line of the log."""

    def __init__(self, *, hidden: bool = False) -> None:
        self.speaks = os.environ.get("RANK", "0") == "0"
        self._console = Console(stderr=True)
        self._hidden = hidden or not self.speaks
        self._bar = RichProgress(
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.description}"),
            TimeRemainingColumn(),
            console=self._console,
            disable=self._hidden or not self._console.is_terminal,
        )
        self._task = self._bar.add_task("", total=None)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, _: type[BaseException] | None, __: BaseException | None, ___: TracebackType | None) -> None:
        self._bar.stop()

    def start(self, step: int, steps: int) -> None:
        self._bar.update(self._task, completed=step, total=steps)
        self._bar.start()

    def step(self, step: int) -> None:
        self._bar.update(self._task, completed=step)

    def log(self, record: dict[str, Any]) -> None:
        loss = "not finite" if record["loss"] is None else f"{record['loss']:.4f}"
        line = (
            f"loss {loss}  {record['samples_per_second']:.1f} samples/s  "
            f"{record['memory_mb']:.0f} MB  {record['mfu']:.0%} of peak"
        )
        self._bar.update(self._task, description=line)
        if not self._hidden and not self._console.is_terminal:
            self._console.print(f"step {record['step']}: {line}", highlight=False, soft_wrap=True)
        if not self._hidden and record["stalled_ema"] > _STALLED:
            self.note(
                f"step {record['step']}: {record['stalled_ema']:.0%} of the average's updates are lost to rounding"
            )

    def note(self, line: str) -> None:
        if self.speaks:
            self._console.print(f"halfstep: {line}", highlight=False, soft_wrap=True, markup=False)


class SampleProgress(SamplingProgress):
    """Sampling steps done of all this process's samples, and the time left."""

    def __init__(self, *, hidden: bool = False) -> None:
        self.speaks = os.environ.get("RANK", "0") == "0"
        self._console = Console(stderr=True)
        self._bar = RichProgress(
            TextColumn("sampling"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("steps of samples"),
            TimeRemainingColumn(),
            console=self._console,
            disable=hidden or not self.speaks or not self._console.is_terminal,
        )
        self._task = self._bar.add_task("", total=None)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, _: type[BaseException] | None, __: BaseException | None, ___: TracebackType | None) -> None:
        self._bar.stop()

    def start(self, samples: int, steps: int) -> None:
        self._bar.update(self._task, total=samples * steps)
        self._bar.start()

    def step(self, samples: int) -> None:
        self._bar.update(self._task, advance=samples)

    def note(self, line: str) -> None:
        if self.speaks:
            self._console.print(f"halfstep: {line}", highlight=False, soft_wrap=True, markup=False)
