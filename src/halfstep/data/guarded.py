"""Sequences that cannot end a run: what fails in their readers is a failure of the one source, with its path."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from collections.abc import Sequence as Ordered
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from halfstep.data.base import Array, FrameSequence, Inspection, SourceError, reading


@dataclass(frozen=True, slots=True)
class Guarded:
    """A sequence that fails by SourceError alone, whatever its reader raises."""

    inner: FrameSequence

    @property
    def key(self) -> str:
        return self.inner.key

    @property
    def label(self) -> str | None:
        return self.inner.label

    @property
    def source(self) -> Path:
        return self.inner.source

    @property
    def expected(self) -> int:
        try:
            with reading(self.source):
                return self.inner.expected
        except SourceError:
            return 0  # an estimate only; inspecting or reading it tells what is wrong

    def files(self) -> list[Path]:
        with reading(self.source):
            return self.inner.files()

    def inspect(self) -> Inspection:
        with reading(self.source):
            return self.inner.inspect()

    def frames(self, numbers: Ordered[int]) -> Iterator[tuple[int, Callable[[], Array]]]:
        with reading(self.source):
            for number, load in self.inner.frames(numbers):
                yield number, partial(self._load, load)

    def _load(self, load: Callable[[], Array]) -> Array:
        with reading(self.source):
            return load()


@dataclass(frozen=True, slots=True)
class Unusable:
    """What was found when sources were listed and cannot be read, for `reason`: a sequence or, with `folder`, all that
    may lie below its key."""

    key: str
    source: Path
    reason: str
    folder: bool = False

    @property
    def label(self) -> str | None:
        return None

    @property
    def expected(self) -> int:
        return 0

    def files(self) -> list[Path]:
        raise SourceError(self.reason)

    def inspect(self) -> Inspection:
        raise SourceError(self.reason)

    def frames(self, numbers: Ordered[int]) -> Iterator[tuple[int, Callable[[], Array]]]:
        raise SourceError(self.reason)
