"""Videos made for a test."""

from pathlib import Path

import av
import numpy as np


def write_video(path: Path, frames: int, *, fps: int = 10) -> None:
    """Frame i is noise around the grey level 48 + 8 * i, so that a decoded frame tells its number."""
    rng = np.random.default_rng(0)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=fps)
        stream.width, stream.height, stream.pix_fmt, stream.gop_size = 32, 32, "yuv420p", 4
        stream.bit_rate = 2_000_000
        for i in range(frames):
            values = 48 + 8 * i + rng.integers(-40, 41, (32, 32, 1)).repeat(3, axis=2)
            frame = av.VideoFrame.from_ndarray(values.astype(np.uint8), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
