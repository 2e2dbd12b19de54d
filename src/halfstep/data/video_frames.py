"""Decoding a video in spite of damage: what decodes comes in the order shown, what does not leaves a gap."""

from __future__ import annotations

from array import array
from bisect import bisect_left, insort
from collections.abc import Iterator
from dataclasses import dataclass, field
from heapq import heappop, heappush
from itertools import groupby, islice
from pathlib import Path

import av

from halfstep.data.video_ends import matroska_faults, missing_bytes
from halfstep.data.video_streams import Film, Packet, open_film
from halfstep.errors import some

# Writers of AVI count one frame too many.
_MISCOUNT = 1

# Frames that a decoder holds at most for the sake of their order.
_MOST_REORDERED = 16


@dataclass(frozen=True)
class Shown:
    """A frame, and that it is shown from `start` to `stop` in the film's steps of time; None for one that is lost."""

    film: Film
    frame: av.VideoFrame | None
    start: int
    stop: int


@dataclass
class _Pass:
    """What is known of a film while it is decoded once. A key is a packet's time, which its frame has too."""

    film: Film
    threaded: bool
    packets: int = 0
    times: array[int] = field(default_factory=lambda: array("q"))  # of all packets that show something
    newest: int = 0  # key of what was sent to the decoder
    pending: list[int] = field(default_factory=list)  # keys of what was sent and has not come out
    lost: list[int] = field(default_factory=list)  # keys, until their turn comes
    ends_shown: bool = True  # whether the last packet is of a frame that is shown
    reason: str = ""  # why the first of them is lost
    breaks_off: str = ""  # why what comes now cannot be read
    faults: list[int] = field(default_factory=list)  # the bytes from which on the file is broken, until they are passed


class _ThreadsLoseTrackError(Exception):
    """A frame does not decode, or may not have; which one can be told only where a single thread decodes."""


def shown_frames(path: Path, problems: list[str]) -> Iterator[Shown]:
    """All frames in the order shown, the lost ones in their places. What was wrong is added to `problems` at the end.

    Raises SourceError when there is no video stream, av.FFmpegError when the file is no video.
    """
    done = 0
    try:
        with open_film(path) as film:
            for shown in _decode_once(_Pass(film, threaded=True), problems):
                yield shown
                done += 1
        return
    except _ThreadsLoseTrackError:
        pass
    with open_film(path) as film:
        yield from islice(_decode_once(_Pass(film, threaded=False), problems), done, None)


def _decode_once(state: _Pass, problems: list[str]) -> Iterator[Shown]:
    film = state.film
    held: tuple[av.VideoFrame | None, int] | None = None
    first = end = count = 0
    lost: list[int] = []
    for key, frame in _in_order(state):
        start = _moment(state, count) if film.counts_moments else key
        if held is None:
            first = start
        else:
            yield Shown(film, *held, start)
        if frame is None:
            lost.append(count)
        held, count = (frame, start), count + 1
    if held is not None:
        end = film.end(first, held[1])
        yield Shown(film, *held, end)
    problems += _problems(state, count, lost, end - first)


def _moment(state: _Pass, number: int) -> int:
    """The time of a frame by its place in the order shown."""
    beyond = number + 1 - len(state.times)  # a packet may hold two frames, and the next one none
    return state.times[number] if beyond <= 0 else state.times[-1] + beyond


def _in_order(state: _Pass) -> Iterator[tuple[int, av.VideoFrame | None]]:
    """Key and frame, the lost ones without, as they are shown."""
    frames = _keyed(state)
    if not state.threaded and state.film.keys_order:
        frames = _sorted(frames)
    for key, frame in frames:
        before = bisect_left(state.lost, key)
        yield from ((gone, None) for gone in state.lost[:before])
        del state.lost[:before]
        if frame.is_corrupt:
            state.reason = state.reason or "damaged in part"
        yield key, None if frame.is_corrupt else frame
    yield from ((gone, None) for gone in state.lost)


def _keyed(state: _Pass) -> Iterator[tuple[int, av.VideoFrame]]:
    key = 0
    for frame in _decoded(state):
        key = key + state.film.usual_duration if frame.pts is None else frame.pts
        _came_out(state, key)
        yield key, frame


def _sorted(frames: Iterator[tuple[int, av.VideoFrame]]) -> Iterator[tuple[int, av.VideoFrame]]:
    """By key: behind a frame that is lost, a decoder may not know any more how many it must wait for."""
    waiting: list[tuple[int, int, av.VideoFrame]] = []
    for count, (key, frame) in enumerate(frames):
        heappush(waiting, (key, count, frame))
        if len(waiting) > _MOST_REORDERED:
            yield heappop(waiting)[::2]
    while waiting:
        yield heappop(waiting)[::2]


def _decoded(state: _Pass) -> Iterator[av.VideoFrame]:
    """Frames as the decoder gives them. Raises _ThreadsLoseTrackError when one does not decode and threads are used."""
    stream = state.film.stream
    stream.thread_type = "AUTO" if state.threaded else "NONE"
    for packet in _packets(state):
        key = packet.dts if packet.pts is None else packet.pts
        if packet.is_corrupt:
            _lose(state, key, "a part of it is missing")
            continue
        if key is not None:
            state.newest = max(key, state.newest)
            if state.film.shows(packet):
                insort(state.pending, key)
        try:
            frames = packet.decode()
        except av.FFmpegError as error:
            if state.threaded:
                raise _ThreadsLoseTrackError from error
            _lose(state, key, str(error.strerror))
            continue
        yield from frames
    try:
        yield from stream.decode(None)
    except av.FFmpegError as error:
        if state.threaded:
            raise _ThreadsLoseTrackError from error
        state.reason = state.reason or str(error.strerror)
    if state.threaded and (state.pending or not state.ends_shown):
        raise _ThreadsLoseTrackError


def _came_out(state: _Pass, key: int) -> None:
    """Note that a frame is decoded. An error is not raised when frames come out with it: what is missing tells."""
    at = bisect_left(state.pending, key)
    if state.pending[at : at + 1] == [key]:
        del state.pending[at]
    if state.threaded and at > 0 and not state.film.may_jump:
        raise _ThreadsLoseTrackError


def _packets(state: _Pass) -> Iterator[Packet]:
    """All packets, those behind a place that cannot be read too."""
    film = state.film
    state.faults = matroska_faults(film.path) if film.is_matroska else []
    while True:
        before = state.packets
        try:
            for packet in film.packets():
                state.packets += 1
                _look_for_gap(state, packet)
                state.ends_shown = film.shows(packet)
                if state.ends_shown:
                    state.times.append(film.time(packet))
                yield packet
            return
        except av.FFmpegError as error:
            state.breaks_off = str(error.strerror)
            if state.packets == before:
                return


def _look_for_gap(state: _Pass, packet: Packet) -> None:
    """Leave room for at least one frame where the file could not be read between the last packet and this one."""
    while state.faults and packet.pos is not None and packet.pos >= state.faults[0]:
        state.breaks_off = _broken(state.faults.pop(0))
    if state.breaks_off:
        key = packet.dts if packet.pts is None else packet.pts
        _lose(state, None if key is None else key - 1, state.breaks_off)
        state.breaks_off = ""


def _lose(state: _Pass, key: int | None, reason: str) -> None:
    insort(state.lost, state.newest + 1 if key is None else key)
    state.reason = state.reason or reason


def _problems(state: _Pass, count: int, lost: list[int], moments: int) -> list[str]:
    film = state.film
    cut = _cut(state, moments)
    if cut:  # the last ones are lost with the end
        while lost and lost[-1] == count - 1:
            lost, count = lost[:-1], count - 1
    problems = []
    decoded = count - len(lost)
    if lost:
        which = f"frame {lost[0]}" if len(lost) == 1 else f"{len(lost)} frames ({_ranges(lost)})"
        problems.append(f"damaged: {which} cannot be decoded ({state.reason})")
    if cut:
        problems.append(f"ends after {_count(decoded, film.declared)} ({cut})")
    if decoded == 0 and not problems:
        problems.append("holds no frames")
    return problems


def _cut(state: _Pass, moments: int) -> str:
    """How the file tells that its end is not the film's; empty when it does not."""
    film = state.film
    if (missing := missing_bytes(film.path)) > 0:
        return f"{missing} bytes are missing"
    if state.faults:
        return _broken(state.faults[0])
    if film.is_indexed and state.packets < len(film.stream.index_entries):
        return "its index lists more"
    if film.counts_moments and moments + _MISCOUNT < film.declared:
        return "its header counts more"
    return state.breaks_off


def _broken(byte: int) -> str:
    return f"from byte {byte} on the file is broken"


def _count(decoded: int, declared: int) -> str:
    return f"{decoded} of {declared} frames" if declared else f"{decoded} frames"


def _ranges(numbers: list[int]) -> str:
    """Ascending numbers as `3, 7-9`."""
    runs = [[n for _, n in group] for _, group in groupby(enumerate(numbers), lambda pair: pair[1] - pair[0])]
    texts = [str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs]
    return some(texts)
