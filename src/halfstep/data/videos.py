"""Videos through PyAV: decoded as a stream, thinned by stride or to a frame rate, in spite of damage as far as it
goes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from collections.abc import Sequence as Ordered
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property, partial
from pathlib import Path
from threading import Lock

import av

from halfstep.data.base import Array, Inspection, SourceError, digest, file_digest
from halfstep.data.video_display import fit_frame
from halfstep.data.video_frames import shown_frames
from halfstep.data.video_times import Sampler, count_taken
from halfstep.errors import InputError
from halfstep.spec import PixelSpec

_NAMES = (
    "3g2 3gp asf avi divx dv f4v flv m1v m2t m2ts m2v m4v mjpeg mjpg mkv mov mp4 mpe mpeg mpg mts mxf nut ogm ogv qt "
    "rm rmvb ts vob webm wmv y4m"
)
EXTENSIONS = frozenset(f".{name}" for name in _NAMES.split())

# Goes into the digest of what is read at a rate: frames that are held count again since this value.
_AT_A_RATE = "held"


@dataclass(frozen=True)
class VideoSequence:
    """A video file. Every `stride`-th frame is taken, or with `fps` the frame shown at each 1/fps seconds; frames are
    numbered as they are taken. Numbers are skipped where frames are lost to damage."""

    key: str
    label: str | None
    source: Path
    pixels: PixelSpec
    stride: int = 1
    fps: float | None = None

    def __post_init__(self) -> None:
        if self.stride < 1 or (self.fps is not None and not 0 < self.fps < float("inf")):
            raise InputError(f"{self.source}: got stride {self.stride} and fps {self.fps}; expected positive numbers")
        if self.stride > 1 and self.fps is not None:
            raise InputError(f"{self.source}: stride and fps both thin the frames; give one of them")

    @cached_property
    def expected(self) -> int:
        """Counted, not decoded; damage makes it fewer."""
        return count_taken(self.source, self.stride, self.fps)

    def files(self) -> list[Path]:
        return [self.source]

    def inspect(self) -> Inspection:
        thinning = (self.stride, self.fps) if self.fps is None else (self.stride, self.fps, _AT_A_RATE)
        return Inspection(digest(file_digest(self.source), repr(thinning).encode()))

    def frames(self, numbers: Ordered[int] = ()) -> Iterator[tuple[int, Callable[[], Array]]]:
        sampler: Sampler | None = None
        problems: list[str] = []
        try:
            for shown in shown_frames(self.source, problems):
                sampler = sampler or Sampler(shown.film, self.stride, self.fps)
                taken = sampler.taken(shown.start, shown.stop)
                if shown.frame is None:
                    continue
                load: Callable[[], Array] = partial(self._fit, shown.frame, shown.film.pixel_shape)
                load = _Once(load) if len(taken) > 1 else load
                for number in taken:
                    yield number, load
        except (av.FFmpegError, OSError) as error:
            raise SourceError(f"{self.source}: damaged after 0 frames ({error.strerror})") from error
        if problems:
            raise SourceError(f"{self.source}: {'; '.join(problems)}")

    def _fit(self, frame: av.VideoFrame, pixel_shape: Fraction) -> Array:
        try:
            return fit_frame(frame, pixel_shape, self.pixels)
        except (av.FFmpegError, MemoryError, ValueError) as error:
            size = f"{frame.width}x{frame.height} pixels"
            raise SourceError(f"{self.source}: {size} cannot be fitted to {self.pixels} ({error})") from error


class _Once:
    """A frame that is shown several times and fitted once, whichever thread asks first."""

    def __init__(self, load: Callable[[], Array]) -> None:
        self._load, self._lock = load, Lock()
        self._value: Array | None = None

    def __call__(self) -> Array:
        with self._lock:
            if self._value is None:
                self._value = self._load()
            return self._value
