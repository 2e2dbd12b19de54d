"""Videos made for a test, and changed in it."""

from fractions import Fraction
from pathlib import Path

import av
import numpy as np


def write_video(
    path: Path,
    frames: int,
    *,
    fps: float = 10,
    codec: str = "mpeg4",
    milliseconds: list[int] | None = None,
    audio: str | None = None,
    gop: int = 4,
    codec_options: dict[str, str] | None = None,
    options: dict[str, str] | None = None,
) -> None:
    """Frame i is noise around the gray level 48 + 8 * i, so that a decoded frame tells its number. It is shown at
    `milliseconds[i]`, by default at i / fps seconds. Sound, where there is some, goes on for longer."""
    rng = np.random.default_rng(0)
    with av.open(str(path), "w", options=options or {}) as container:
        rate = Fraction(fps).limit_denominator(1001)
        stream = container.add_stream(codec, rate=rate, options=codec_options or {})
        stream.width, stream.height, stream.pix_fmt, stream.gop_size = 32, 32, "yuv420p", gop
        stream.bit_rate = 2_000_000
        if milliseconds is not None:
            stream.time_base = stream.codec_context.time_base = Fraction(1, 1000)
        sound = container.add_stream(audio, rate=48000) if audio else None
        for i in range(frames):
            values = 48 + 8 * i + rng.integers(-40, 41, (32, 32, 1)).repeat(3, axis=2)
            frame = av.VideoFrame.from_ndarray(values.astype(np.uint8), format="rgb24")
            if milliseconds is not None:
                frame.pts, frame.time_base = milliseconds[i], Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
        if sound is not None:
            for start in range(0, int(48000 * (frames / fps + 0.3)), 960):
                noise = rng.normal(0, 0.1, (2, 960)).astype(np.float32)
                part = av.AudioFrame.from_ndarray(noise, format="fltp", layout="stereo")
                part.sample_rate, part.pts = 48000, start
                container.mux(sound.encode(part))
            container.mux(sound.encode())


def packets(path: Path) -> list[bytes]:
    with av.open(str(path)) as container:
        return [bytes(packet) for packet in container.demux(video=0) if packet.size]


def overwrite(path: Path, old: bytes, new: bytes) -> None:
    data = path.read_bytes()
    assert data.count(old) == 1
    path.write_bytes(data.replace(old, new))
