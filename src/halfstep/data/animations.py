"""Animated pictures (GIF, WebP, APNG, AVIF, ...) and documents of several pages as sequences of frames."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Ordered
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from pathlib import Path

from halfstep.data.base import Array, Inspection, digest, file_digest
from halfstep.data.pictures import fit, frames_in, opened, to_rgb
from halfstep.spec import PixelSpec

_UNTIMED = 100  # milliseconds for which a frame that does not say so is shown, as browsers do


@dataclass(frozen=True, slots=True)
class AnimationSequence:
    """A picture whose frames are moments. Every `stride`-th frame is taken, or with `fps` the frame shown at each 1/fps
    seconds, again where it is held; frames are numbered as they are taken."""

    key: str
    label: str | None
    source: Path
    pixels: PixelSpec
    stride: int = 1
    fps: float | None = None

    @property
    def expected(self) -> int:
        return -(-frames_in(self.source) // self.stride)

    def files(self) -> list[Path]:
        return [self.source]

    def inspect(self) -> Inspection:
        return Inspection(digest(file_digest(self.source), repr((self.stride, self.fps)).encode()))

    def frames(self, numbers: Ordered[int] = ()) -> Iterator[tuple[int, Callable[[], Array]]]:
        taken, ends = 0, Fraction(0)
        with opened(self.source) as image:
            # An APNG may begin with a picture for those who do not know animations.
            first = int(bool(image.info.get("default_image")))
            for index in range(first, getattr(image, "n_frames", 1)):
                image.seek(index)
                image.load()
                times = int((index - first) % self.stride == 0)
                if self.fps is not None:
                    ends += Fraction(image.info.get("duration") or _UNTIMED) / 1000
                    times = max(0, math.ceil(ends * Fraction(self.fps)) - taken)
                if times:
                    load = partial(fit, to_rgb(image), self.pixels)
                    yield from ((taken + held, load) for held in range(times))
                    taken += times
