"""When the frames of a video are shown, and which of them are taken at a stride or a rate."""

from __future__ import annotations

import math
from contextlib import suppress
from fractions import Fraction
from itertools import pairwise
from pathlib import Path

import av

from halfstep.data.base import SourceError
from halfstep.data.video_streams import Film, open_film

# In a stream whose times may start anew, a frame that seems to be shown for longer than this is not.
_LONGEST_HOLD = 10  # seconds

_MILLISECOND = Fraction(1, 1000)


class Sampler:
    """Every `stride`-th frame of a film, or with `fps` the frame that is shown at each 1/fps seconds from the first one
    on: again and again while it is held, and not at all when it is gone by then."""

    def __init__(self, film: Film, stride: int, fps: float | None) -> None:
        self._film, self._in_seconds = film, fps is not None
        self._step = stride if fps is None else 1 / Fraction(fps).limit_denominator(1_000_000)
        self._place = Fraction(0)
        self._rounded = self._in_seconds and film.unit == _MILLISECOND

    def taken(self, start: int, stop: int) -> range:
        """The numbers under which a frame is taken that is shown from step `start` to `stop` of the film's time. To be
        asked for each frame in turn, of those that are lost too."""
        begin = self._place
        self._place += self._length(start, stop)
        return range(self._number(begin), self._number(self._place))

    def _length(self, start: int, stop: int) -> Fraction:
        if not self._in_seconds:
            return Fraction(max(0, stop - start) if self._film.counts_moments else 1)
        seconds = (stop - start) * self._film.unit
        if self._film.may_jump and not 0 <= seconds <= _LONGEST_HOLD:
            seconds = self._film.usual_duration * self._film.unit
        return max(Fraction(0), seconds)

    def _number(self, place: Fraction) -> int:
        if self._rounded and self._film.rate:  # at a constant rate, what was rounded is known
            exact = round(place * self._film.rate) / self._film.rate
            place = exact if abs(exact - place) <= _MILLISECOND else place
        return math.ceil(place / self._step)


def count_taken(path: Path, stride: int, fps: float | None) -> int:
    """How many frames of a video are taken; 0 when it is none. Decodes nothing, but reads the whole file unless its
    container lists the frames."""
    try:
        with open_film(path) as film:
            sampler = Sampler(film, stride, fps)
            if fps is None and (listed := film.listed):
                return -(-listed // stride)
            times = _times(film)
            taken = range(0)
            for start, stop in pairwise([*times, film.end(times[0], times[-1])] if times else []):
                taken = sampler.taken(start, stop)
            return taken.stop
    except (av.FFmpegError, SourceError):
        return 0  # reading it tells what is wrong with it


def _times(film: Film) -> list[int]:
    """When each frame is shown, as far as the file can be read."""
    times: list[int] = []
    with suppress(av.FFmpegError):  # reading it tells what is wrong with it
        times.extend(film.time(packet) for packet in film.packets() if film.shows(packet) and not packet.is_corrupt)
    return sorted(times)
