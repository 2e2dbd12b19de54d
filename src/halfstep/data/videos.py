"""Videos through PyAV: decoded as a stream, thinned by stride or to a frame rate, damaged tails kept up to the
damage."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from collections.abc import Sequence as Ordered
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from pathlib import Path

import av
import numpy as np
from PIL import Image

from halfstep.data.base import Array, Inspection, SourceError, digest, file_digest
from halfstep.data.pictures import fit
from halfstep.errors import InputError
from halfstep.spec import PixelSpec

_NAMES = (
    "3g2 3gp asf avi divx dv f4v flv m1v m2t m2ts m2v m4v mjpeg mjpg mkv mov mp4 mpe mpeg mpg mts mxf nut ogm ogv qt "
    "rm rmvb ts vob webm wmv y4m"
)
EXTENSIONS = frozenset(f".{name}" for name in _NAMES.split())


@dataclass(frozen=True, slots=True)
class VideoSequence:
    """A video file. Every `stride`-th frame is taken, or with `fps` the frame shown at each 1/fps seconds; frames are
    numbered as they are taken."""

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

    @property
    def expected(self) -> int:
        try:
            with av.open(str(self.source)) as container:
                stream = container.streams.video[0]
                seconds = float(stream.duration * stream.time_base) if stream.duration and stream.time_base else 0.0
                return round(seconds * self.fps) if self.fps is not None else -(-stream.frames // self.stride)
        except (av.FFmpegError, IndexError):
            return 0  # an estimate only; reading the video tells what is wrong with it

    def inspect(self) -> Inspection:
        return Inspection(digest(file_digest(self.source), repr((self.stride, self.fps)).encode()))

    def frames(self, numbers: Ordered[int] = ()) -> Iterator[tuple[int, Callable[[], Array]]]:
        decoded = packets = declared = taken = 0
        next_time: Fraction | None = None
        try:
            with av.open(str(self.source)) as container:
                if not container.streams.video:
                    raise SourceError(f"{self.source}: has no video stream")
                stream = container.streams.video[0]
                stream.thread_type = "AUTO"
                declared = stream.frames
                for packet in container.demux(stream):
                    packets += packet.size > 0
                    for frame in packet.decode():
                        decoded += 1
                        if self.fps is None:
                            wanted = (decoded - 1) % self.stride == 0
                        else:
                            now = Fraction(frame.pts or 0) * Fraction(frame.time_base or 1)
                            next_time = now if next_time is None else next_time
                            wanted = now >= next_time
                            while next_time <= now:
                                next_time += 1 / Fraction(self.fps)
                        if wanted:
                            yield taken, partial(_fit_frame, frame, self.pixels)
                            taken += 1
        except av.FFmpegError as error:
            raise SourceError(f"{self.source}: damaged after {_count(decoded, declared)} ({error.strerror})") from error
        if packets < declared:  # packets, because a whole file may have frames that it says not to show
            raise SourceError(f"{self.source}: ends after {_count(decoded, declared)}")
        if decoded == 0:
            raise SourceError(f"{self.source}: holds no frames")


def _count(decoded: int, declared: int) -> str:
    return f"{decoded} of {declared} frames" if declared else f"{decoded} frames"


def _fit_frame(frame: av.VideoFrame, pixels: PixelSpec) -> Array:
    values = frame.to_ndarray(format="rgb24")
    if frame.rotation % 360:  # phones record the orientation beside the picture
        values = np.rot90(values, frame.rotation // 90)
    return fit(Image.fromarray(values), pixels)
