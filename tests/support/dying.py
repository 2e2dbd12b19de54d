"""Processes that die, as by kill -9, at any point of their own code."""

import os
import signal
import sys
import threading
from types import FrameType, TracebackType
from typing import Any, Self


class Calls:
    """Counts the calls of functions that all threads make from `start` to `stop`; the `last` one kills the process."""

    def __init__(self, last: int = -1) -> None:
        self.made = 0
        self._last = last

    def start(self) -> None:
        threading.setprofile(self._count)
        sys.setprofile(self._count)

    def stop(self) -> None:
        sys.setprofile(None)
        threading.setprofile(None)

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, _: type[BaseException] | None, __: BaseException | None, ___: TracebackType | None) -> None:
        self.stop()

    def _count(self, frame: FrameType, event: str, argument: Any) -> None:
        self.made += 1
        if self.made == self._last:
            os.kill(os.getpid(), signal.SIGKILL)
