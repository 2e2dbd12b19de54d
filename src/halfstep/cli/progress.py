"""The progress bars of long verbs, on stderr."""

from __future__ import annotations

import os
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, ProgressColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress

from halfstep.encode import Progress as EncodingProgress
from halfstep.generate.makers import Progress as SamplingProgress
from halfstep.train.loop import Progress as TrainingProgress

_STALLED = 0.5  # of the updates of an average: more than this are lost to rounding


class _Bar:
    """One bar, shown on a terminal from `show` to the end of the block. Under torchrun only the first process shows its
    own share, and only it `speaks`."""

    def __init__(self, *columns: ProgressColumn, hidden: bool, description: str, **fields: Any) -> None:
        self.speaks = os.environ.get("RANK", "0") == "0"
        self._console = Console(stderr=True)
        self._hidden = hidden or not self.speaks
        self._bar = RichProgress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            *columns,
            TimeRemainingColumn(),
            console=self._console,
            disable=self._hidden or not self._console.is_terminal,
        )
        self._task = self._bar.add_task(description, total=None, **fields)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, _: type[BaseException] | None, __: BaseException | None, ___: TracebackType | None) -> None:
        self._bar.stop()

    def note(self, line: str) -> None:
        """A line that the user should see, whether there is a bar or not."""
        if self.speaks:
            self._console.print(f"halfstep: {line}", highlight=False, soft_wrap=True, markup=False)

    def _show(self, total: int | None, completed: int = 0) -> None:
        self._bar.update(self._task, total=total, completed=completed)
        self._bar.start()


class EncodeBar(_Bar, EncodingProgress):
    """Items done of all, items a second, bytes written."""

    def __init__(self, *, hidden: bool = False) -> None:
        columns = TextColumn("{task.fields[rate]:.1f} items/s"), TextColumn("{task.fields[megabytes]:.1f} MB")
        super().__init__(*columns, hidden=hidden, description="encoding", rate=0.0, megabytes=0.0)
        self._bytes = 0

    def start(self, items: int) -> None:
        self._show(items or None)

    def advance(self, items: int, latent_bytes: int) -> None:
        self._bytes += latent_bytes
        rate = self._bar.tasks[0].speed or 0.0
        self._bar.update(self._task, advance=items, rate=rate, megabytes=self._bytes / 1e6)


class GenerateBar(_Bar):
    """Sampling steps done of all runs, and which run is made."""

    def __init__(self, runs: int, *, hidden: bool = False) -> None:
        super().__init__(TextColumn("steps"), hidden=hidden, description="generating")
        self._runs = runs
        self._seen: dict[str, int] = {}
        self._show(None)

    def step(self, run: str, step: int, steps: int) -> None:
        self._seen[run] = step
        done = sum(self._seen.values())
        self._bar.update(self._task, description=run, completed=done, total=steps * self._runs)


class TrainBar(_Bar, TrainingProgress):
    """Training steps done, the newest loss and rate; without a terminal a line for each line of the log."""

    def __init__(self, *, hidden: bool = False) -> None:
        super().__init__(TextColumn("{task.fields[newest]}"), hidden=hidden, description="training", newest="")

    def start(self, step: int, steps: int) -> None:
        self._show(steps, step)

    def step(self, step: int) -> None:
        self._bar.update(self._task, completed=step)

    def log(self, record: dict[str, Any]) -> None:
        loss = "not finite" if record["loss"] is None else f"{record['loss']:.4f}"
        line = (
            f"loss {loss}  {record['samples_per_second']:.1f} samples/s  "
            f"{record['memory_mb']:.0f} MB  {record['mfu']:.0%} of peak"
        )
        self._bar.update(self._task, newest=line)
        if self._hidden:
            return
        if not self._console.is_terminal:
            self._console.print(f"step {record['step']}: {line}", highlight=False, soft_wrap=True)
        if (record["stalled_ema"] or 0) > _STALLED:
            self.note(
                f"step {record['step']}: {record['stalled_ema']:.0%} of the average's updates are lost to rounding"
            )


class SampleBar(_Bar, SamplingProgress):
    """Sampling steps done of all this process's samples."""

    def __init__(self, *, hidden: bool = False) -> None:
        super().__init__(TextColumn("steps of samples"), hidden=hidden, description="sampling")

    def start(self, samples: int, steps: int) -> None:
        self._show(samples * steps)

    def step(self, samples: int) -> None:
        self._bar.update(self._task, advance=samples)


class EvaluateBar(_Bar):
    """Parts of an evaluation that are done."""

    def __init__(self, *, hidden: bool = False) -> None:
        super().__init__(hidden=hidden, description="evaluating")
        self._show(None)

    def part(self, done: int, parts: int) -> None:
        self._bar.update(self._task, completed=done, total=parts)
