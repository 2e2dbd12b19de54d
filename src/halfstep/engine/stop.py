"""Ctrl-C and SIGTERM as requests: work stops where it can go on from."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist


class StopRequest:
    """True once this process was asked to stop. Several processes agree on it, one step later, so that none waits for
    the others' word."""

    def __init__(self) -> None:
        self._asked = False
        self._agreed = False
        self._told: tuple[torch.Tensor, Any] | None = None

    def ask(self, number: int, _: FrameType | None) -> None:
        """As a signal's handler."""
        if self._asked and number == signal.SIGINT:
            raise KeyboardInterrupt  # asked twice: at once
        self._asked = True

    def agree(self) -> None:
        """Tell the others, and hear what they told a step ago."""
        if not dist.is_initialized():
            return
        self.hear()
        asked = torch.tensor(int(self._asked))
        self._told = asked, dist.all_reduce(asked, dist.ReduceOp.MAX, async_op=True)

    def hear(self) -> None:
        """Wait for what was told last."""
        if self._told is not None:
            heard, work = self._told
            work.wait()
            self._agreed, self._told = bool(heard), None

    def __bool__(self) -> bool:
        return self._agreed or (self._asked and not dist.is_initialized())


@contextmanager
def stop_request() -> Iterator[StopRequest]:
    """Take SIGINT and SIGTERM as requests within the block; in the main thread, which alone hears signals."""
    stop = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = {number: signal.signal(number, stop.ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
