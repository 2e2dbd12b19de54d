"""Opening a video file and choosing its film; its packets, and what they tell before anything is decoded."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import TypeAlias

import av
from av.container import InputContainer
from av.stream import Disposition
from av.video.stream import VideoStream

from halfstep.data.base import SourceError
from halfstep.data.video_ends import avi_moments

Packet: TypeAlias = "av.Packet[VideoStream]"

_VP8_SHOWN = 0x10  # in the first byte of a frame


class Film:
    """The video stream of an open file. Times are in steps of `unit` seconds."""

    def __init__(self, path: Path, container: InputContainer, stream: VideoStream) -> None:
        self.path, self.container, self.stream = path, container, stream
        self.unit = stream.time_base or Fraction(1)
        formats = container.format.name.split(",")
        # In an AVI a time is a place in the row of moments; packets have them in the order of decoding.
        self.counts_moments = "avi" in formats
        self.is_matroska = "matroska" in formats
        self.is_indexed = "mp4" in formats  # the container lists its frames
        self.may_jump = not {"mpegts", "mpeg"}.isdisjoint(formats)  # broadcasts may start anew in the middle
        # Whether the times of packets give the order in which their frames are shown.
        self.keys_order = not self.counts_moments and not self.may_jump
        self.rate = stream.average_rate or stream.guessed_rate  # frames a second
        self.usual_duration = max(1, round(1 / self.rate / self.unit)) if self.rate else 1
        self.pixel_shape = stream.sample_aspect_ratio or Fraction(1)  # width by height
        self._last_duration: int | None = None
        self._last_time = -self.usual_duration

    @property
    def declared(self) -> int:
        """The frames that the container says it has, or lists as to be shown; 0 when it does not say."""
        if self.is_indexed:
            return sum(not entry.is_discard for entry in self.stream.index_entries)
        return self.stream.frames

    @property
    def listed(self) -> int:
        """The frames that are listed before any is read, and lie in the file; 0 when the container has no such list."""
        if not self.is_indexed or not self.stream.frames:  # in fragments, each lists its own
            return 0
        size = self.container.size
        return sum(not entry.is_discard and entry.pos + entry.size <= size for entry in self.stream.index_entries)

    def packets(self) -> Iterator[Packet]:
        """All packets that hold something. Raises av.FFmpegError where the file cannot be read; asked again, it goes on
        behind that place."""
        for packet in self.container.demux(self.stream):
            if packet.size:
                self._last_duration = packet.duration
                yield packet

    def time(self, packet: Packet) -> int:
        """When the frame of a packet is shown; of an AVI, sorted times are those of the frames in the order shown."""
        time = packet.dts if self.counts_moments or packet.pts is None else packet.pts
        self._last_time = self._last_time + self.usual_duration if time is None else time
        return self._last_time

    def shows(self, packet: Packet) -> bool:
        """Whether the frame of a packet is to be shown: some serve as references only."""
        if packet.is_discard:
            return False
        return self.stream.codec_context.name != "vp8" or bool(memoryview(packet)[0] & _VP8_SHOWN)

    def end(self, first: int, last: int) -> int:
        """When the last frame is gone, all packets read and the first and last frame shown at these times."""
        if not self.counts_moments:
            # The duration of the last packet, in the order of decoding, is the only one that no next frame explains.
            return last + (self._last_duration or self.usual_duration)
        moments = last + 1 - first
        if moments < self.stream.frames:  # the last ones may be repeats, of which only the file's own chunks tell
            moments = max(moments, min(self.stream.frames, avi_moments(self.path, self.stream.index)))
        return first + moments


@contextmanager
def open_film(path: Path) -> Iterator[Film]:
    """The best video stream; a picture that is attached as a cover is none. Raises SourceError when there is no stream
    or no decoder for it, av.FFmpegError when the file is no video."""
    with av.open(str(path), metadata_errors="ignore") as container:
        films = [s for s in container.streams.video if not s.disposition & Disposition.attached_pic]
        if not films:
            raise SourceError(f"{path}: has no video stream")
        best = container.streams.best("video")
        stream = next((film for film in films if film is best), films[0])
        if stream.codec_context is None:
            raise SourceError(f"{path}: no decoder for its video stream")
        yield Film(path, container, stream)
