"""Cutting a video's frames into clips of one length, for autoencoders over time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Literal, TypeVar

# What becomes of the frames after the last whole clip: left out, made a clip with the last one repeated, or made a clip
# that begins earlier and ends with them.
LastClip = Literal["drop", "pad", "overlap"]

T = TypeVar("T")
Frames = list[tuple[int, T]]


def cut_clips(frames: Iterable[tuple[int, T]], length: int, last: LastClip) -> Iterator[Frames[T]]:
    """Clips of `length` numbered frames and, shorter, those that are left out. No clip crosses a gap in the numbers:
    what comes before it and what comes after it are cut like two videos."""
    whole: Frames[T] = []
    rest: Frames[T] = []
    for number, frame in frames:
        newest = rest or whole
        if newest and number != newest[-1][0] + 1:
            yield from _last_clip(whole, rest, length, last)
            whole, rest = [], []
        rest.append((number, frame))
        if len(rest) == length:
            yield rest
            whole, rest = rest, []
    yield from _last_clip(whole, rest, length, last)


def _last_clip(whole: Frames[T], rest: Frames[T], length: int, last: LastClip) -> Iterator[Frames[T]]:
    if not rest:
        return
    if last == "pad":
        yield rest + [rest[-1]] * (length - len(rest))
    elif last == "overlap" and whole:
        yield (whole + rest)[-length:]
    else:
        yield rest
