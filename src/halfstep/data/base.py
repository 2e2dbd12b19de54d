"""What a source of frames looks like to whoever encodes or trains: sequences that can be inspected and read."""

from __future__ import annotations

import hashlib
import os
import traceback
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Ordered
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from halfstep.errors import HalfstepError, InputError
from halfstep.store.index import DIGEST_BYTES

Array = npt.NDArray[Any]


class SourceError(InputError):
    """One picture, video or walk that cannot be read; the others can."""


@dataclass(frozen=True)
class Problem:
    """Why a frame, or with `frame=None` a whole sequence or part of it, is missing from what can be read."""

    reason: str
    frame: int | None = None


@dataclass(frozen=True)
class Inspection:
    """What a sequence consists of, by content and without decoding it.

    `numbers` are the frames' numbers in the source and `digests` their contents' digests, DIGEST_BYTES each; both are
    empty for a video, whose frames are known only once it is decoded. `content` is the digest of everything. `arrays`
    hold what belongs to each frame, in the order of `numbers`. `unused` counts the frames of an animation, or the
    pages of a document, beyond the first one.
    """

    content: bytes
    numbers: tuple[int, ...] = ()
    digests: tuple[bytes, ...] = ()
    arrays: dict[str, Array] = field(default_factory=dict)
    problems: tuple[Problem, ...] = ()
    unused: int = 0


class FrameSequence(Protocol):
    """A picture, a video or a walk. `expected` estimates its frames, for progress; `temporal` says that its
    frames are consecutive moments, which an autoencoder over time may compress together."""

    @property
    def key(self) -> str: ...
    @property
    def label(self) -> str | None: ...
    @property
    def source(self) -> Path: ...
    @property
    def expected(self) -> int: ...

    def files(self) -> list[Path]:
        """The files that the frames are in. Raises SourceError when they cannot be told."""

    def inspect(self) -> Inspection:
        """Digests of what is there. Raises SourceError when the sequence is unusable as a whole."""

    def frames(self, numbers: Ordered[int]) -> Iterator[tuple[int, Callable[[], Array]]]:
        """Number and loader of each wanted frame, in order; a video yields all of its frames.

        A loader returns the fitted frame, uint8 [H, W, 3] (or float32 latents [C, H, W] for a source of latents), may
        run in any thread, and raises SourceError. The iterator itself raises SourceError where a video breaks off.
        """


@contextmanager
def reading(source: Path) -> Iterator[None]:
    """Whatever fails in this block is a SourceError that names `source`: decoders of damaged files raise anything, and
    one odd file must not end a run. Of what nobody foresaw, HALFSTEP_DEBUG in the environment shows the traceback."""
    try:
        yield
    except SourceError:
        raise
    except HalfstepError as error:
        raise SourceError(str(error)) from error
    except Exception as error:
        if os.environ.get("HALFSTEP_DEBUG"):
            traceback.print_exception(error)
        raise SourceError(f"{source}: cannot be read ({type(error).__name__}: {one_line(error)})") from error


def one_line(error: Exception) -> str:
    """What an error says, without line breaks and of a bearable length; its type where it says nothing."""
    return " ".join(str(error).split())[:160] or type(error).__name__


def digest(*parts: bytes) -> bytes:
    """A short content digest; parts are kept apart by their lengths."""
    state = hashlib.sha256()
    for part in parts:
        state.update(len(part).to_bytes(8, "little"))
        state.update(part)
    return state.digest()[:DIGEST_BYTES]


def file_digest(path: Path) -> bytes:
    """The content digest of a file. Raises SourceError when it cannot be read."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").digest()[:DIGEST_BYTES]
    except OSError as error:
        raise SourceError(f"{path}: cannot be read ({error.strerror})") from error


def contiguous_runs(numbers: Array) -> list[tuple[int, int]]:
    """[start, stop) of the stretches in which frame numbers grow by one: a missing frame ends a stretch."""
    if len(numbers) == 0:
        return []
    breaks = np.flatnonzero(np.diff(numbers) != 1) + 1
    edges = [0, *breaks.tolist(), len(numbers)]
    return list(pairwise(edges))
