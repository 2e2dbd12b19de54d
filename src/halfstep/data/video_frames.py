"""Decoding a video in spite of damage: what decodes comes in the order shown, what does not leaves a gap."""

from __future__ import annotations

from array import array
from bisect import bisect_left, insort
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import groupby, islice
from pathlib import Path

import av

from halfstep.data.video_ends import matroska_fault, missing_bytes
from halfstep.data.video_streams import Film, Packet, open_film
from halfstep.errors import some

# Writers of AVI count one frame too many.
_MISCOUNT = 1


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
    newest_sent: int | None = None
    newest_decoded: int | None = None
    lost: list[int] = field(default_factory=list)  # keys, until their turn comes
    reason: str = ""  # why the first of them is lost
    breaks_off: str = ""  # why what comes now cannot be read
    fault: int | None = None  # the byte where the file is broken, until it is passed


class _ThreadsLoseTrackError(Exception):
    """A frame does not decode; which one can be told only where a single thread decodes."""


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
    key = 0
    for frame in _decoded(state):
        key = key + state.film.usual_duration if frame.pts is None else frame.pts
        state.newest_decoded = max(key, key if state.newest_decoded is None else state.newest_decoded)
        before = bisect_left(state.lost, key)
        yield from ((gone, None) for gone in state.lost[:before])
        del state.lost[:before]
        if frame.is_corrupt:
            state.reason = state.reason or "damaged in part"
            yield key, None
        else:
            yield key, frame
    yield from ((gone, None) for gone in state.lost)


def _decoded(state: _Pass) -> Iterator[av.VideoFrame]:
    """Frames as the decoder gives them. Raises _ThreadsLoseTrackError when one does not decode and threads are used."""
    stream = state.film.stream
    stream.thread_type = "AUTO" if state.threaded else "NONE"
    for packet in _packets(state):
        key = packet.dts if packet.pts is None else packet.pts
        if packet.is_corrupt:
            _lose(state, key, "a part of it is missing")
            continue
        try:
            frames = packet.decode()
        except av.FFmpegError as error:
            if state.threaded:
                raise _ThreadsLoseTrackError from error
            _lose(state, key, str(error.strerror))
            continue
        if key is not None and state.film.shows(packet):
            state.newest_sent = max(key, key if state.newest_sent is None else state.newest_sent)
        yield from frames
    try:
        yield from stream.decode(None)
    except av.FFmpegError as error:
        if state.threaded:
            raise _ThreadsLoseTrackError from error
        state.reason = state.reason or str(error.strerror)
    if state.threaded and state.newest_sent is not None and state.newest_sent > (state.newest_decoded or 0):
        raise _ThreadsLoseTrackError  # after an error the rest of what the threads hold does not come out


def _packets(state: _Pass) -> Iterator[Packet]:
    """All packets, those behind a place that cannot be read too."""
    state.fault = matroska_fault(state.film.path) if state.film.is_matroska else None
    while True:
        before = state.packets
        try:
            for packet in state.film.packets():
                state.packets += 1
                _look_for_gap(state, packet)
                if state.film.shows(packet):
                    state.times.append(state.film.time(packet))
                yield packet
            return
        except av.FFmpegError as error:
            state.breaks_off = str(error.strerror)
            if state.packets == before:
                return


def _look_for_gap(state: _Pass, packet: Packet) -> None:
    """Leave room for at least one frame where the file could not be read between the last packet and this one."""
    if state.fault is not None and packet.pos is not None and packet.pos >= state.fault:
        state.breaks_off, state.fault = _broken(state.fault), None
    if state.breaks_off:
        key = packet.dts if packet.pts is None else packet.pts
        _lose(state, None if key is None else key - 1, state.breaks_off)
        state.breaks_off = ""


def _lose(state: _Pass, key: int | None, reason: str) -> None:
    insort(state.lost, (state.newest_sent or 0) + 1 if key is None else key)
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
    if state.fault is not None:
        return _broken(state.fault)
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
