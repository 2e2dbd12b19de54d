"""What was shown, kept in memory while it is recorded, and as a film."""

from __future__ import annotations

import io
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import Image

from halfstep.data.outputs import encode_video
from halfstep.web.live.stage import Shown, Stage

MOST_BYTES = 128 << 20  # of JPEGs; then it stops


class Recording:
    """The frames between `start` and `stop`. A new start forgets the ones before."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._frames: list[tuple[float, bytes]] = []
        self._bytes = 0
        self._leave: Callable[[], None] | None = None

    def start(self, stage: Stage) -> None:
        self.stop()
        with self._lock:
            self._frames, self._bytes = [], 0
        self._leave = stage.listen(self._keep)

    def stop(self) -> None:
        if self._leave is not None:
            self._leave()
            self._leave = None

    def facts(self) -> dict[str, Any]:
        with self._lock:
            return {"on": self._leave is not None, "frames": len(self._frames), "full": self._bytes >= MOST_BYTES}

    def as_mp4(self) -> bytes | None:
        """H.264 at the mean rate of the frames; None when there are none."""
        with self._lock:
            frames = list(self._frames)
        if not frames:
            return None
        lasted = frames[-1][0] - frames[0][0]
        rate = max(1, round((len(frames) - 1) / lasted)) if lasted > 0 else 1
        return encode_video((np.asarray(Image.open(io.BytesIO(jpeg))) for _, jpeg in frames), rate)

    def _keep(self, frame: Shown) -> None:
        with self._lock:
            if self._bytes < MOST_BYTES:
                self._frames.append((time.monotonic(), frame.jpeg))
                self._bytes += len(frame.jpeg)
