"""The stage: a LiveEngine in a thread of its own. Wishes go in from any thread, frames come out to whoever listens."""

from __future__ import annotations

import io
import json
import struct
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from PIL import Image

from halfstep.errors import HalfstepError
from halfstep.live import STILL, Action, LiveEngine, LiveFrame
from halfstep.live.frames import Picture

_QUALITY = 88
MOST_PIXELS = 1 << 24  # of a picture that comes in: a few bytes can claim a thousand times as many
_IDLE_S = 0.5  # how often a stage that waits looks whether it is to end
Listener = Callable[["Shown"], None]
Call = Callable[[LiveEngine], LiveFrame | None] | Callable[[LiveEngine], None]


@dataclass(frozen=True)
class Shown:
    """A frame as it is sent: a JPEG and what belongs to it. `heard`: the number of the last wish that it follows."""

    jpeg: bytes
    facts: dict[str, Any]

    def message(self) -> bytes:
        """The length of the facts (2 bytes, big-endian), the facts as JSON, the JPEG."""
        head = json.dumps(self.facts).encode()
        return struct.pack(">H", len(head)) + head + self.jpeg


@dataclass
class _Wishes:
    """What was asked for and not done yet."""

    action: Action = STILL
    number: int = 0
    picture: Picture | None = None
    calls: list[tuple[Call, Future[None]]] = field(default_factory=list)


class Stage:
    """Steps while an action is held, while pictures come, or with `always` without either; at most `most_per_second`
    frames a second. A model that takes pictures steps once for each that it is in time for: the newest, and those that
    it was not in time for are counted."""

    def __init__(self, engine: LiveEngine, *, always: bool = False, most_per_second: float = 30.0) -> None:
        self._engine, self._always, self._pause_s = engine, always, 1 / most_per_second
        self._changed = threading.Condition()
        self._wishes = _Wishes()
        self._listeners: list[Listener] = []
        self._ended = False
        self.dropped = 0
        self.last: Shown | None = None
        self._pool = ThreadPoolExecutor(1, "live")
        self._work_done: Future[None] | None = None

    def start(self) -> None:
        self._work_done = self._pool.submit(self._work)

    @property
    def failed(self) -> bool:
        """Whether something ended it before its time, which `end` raises."""
        return self._work_done is not None and self._work_done.done()

    def end(self) -> None:
        """Finish the frame under way. Raises what the stage failed with, if it did."""
        with self._changed:
            self._ended = True
            self._changed.notify()
        self._pool.shutdown()
        if self._work_done is not None:
            self._work_done.result()

    def listen(self, listener: Listener) -> Callable[[], None]:
        """Call `listener` with each frame, in the stage's thread; returns how to stop that."""
        with self._changed:
            self._listeners = [*self._listeners, listener]
            last = self.last
        if last is not None:
            listener(last)

        def stop() -> None:
            with self._changed:
                self._listeners = [one for one in self._listeners if one is not listener]

        return stop

    def act(self, action: Action, number: int) -> None:
        """What is held from now on; `number` comes back with the first frame that follows it."""
        with self._changed:
            self._wishes.action, self._wishes.number = action, number
            self._changed.notify()

    def see(self, picture: Picture) -> None:
        """A picture that was taken; one that the model was not in time for is dropped."""
        with self._changed:
            self.dropped += self._wishes.picture is not None
            self._wishes.picture = picture
            self._changed.notify()

    def ask(self, call: Call) -> Future[None]:
        """Have something done to the engine between two frames. What it raises, the future raises."""
        future: Future[None] = Future()
        with self._changed:
            self._wishes.calls.append((call, future))
            self._changed.notify()
        return future

    def facts(self) -> dict[str, Any]:
        return {**self._engine.facts(), "dropped": self.dropped}

    def _work(self) -> None:
        self._show(self._engine.reset(), 0)
        while True:
            with self._changed:
                while not self._has_work():
                    self._changed.wait(_IDLE_S)
                if self._ended:
                    break
                wishes = self._wishes
                self._wishes = _Wishes(wishes.action, wishes.number)
            started = time.monotonic()
            self._do(wishes)
            with self._changed:
                rest = self._pause_s - (time.monotonic() - started)
                if rest > 0 and not self._ended:
                    self._changed.wait_for(lambda: self._ended or bool(self._wishes.calls), rest)
        self._engine.close()

    def _has_work(self) -> bool:
        wishes = self._wishes
        return self._ended or self._always or bool(wishes.calls) or wishes.picture is not None or wishes.action != STILL

    def _do(self, wishes: _Wishes) -> None:
        for call, future in wishes.calls:
            if not future.set_running_or_notify_cancel():
                continue  # whoever asked is gone
            try:
                frame = call(self._engine)
            except HalfstepError as error:
                future.set_exception(error)
                continue
            if frame is not None:
                self._show(frame, wishes.number)
            future.set_result(None)
        if wishes.picture is not None:
            self._show(self._engine.step(wishes.picture), wishes.number)
        elif wishes.action != STILL or self._always:
            self._show(self._engine.step(wishes.action), wishes.number)

    def _show(self, frame: LiveFrame, heard: int) -> None:
        started = time.perf_counter()
        facts = {
            "number": frame.number,
            "seed": frame.seed,
            "precision": frame.precision,
            "simulated": frame.simulated,
            "difference": None if frame.difference is None else round(frame.difference, 3),
            "problem": frame.problem,
            "heard": heard,
        }
        shown = Shown(as_jpeg(frame.picture), facts)
        self._engine.meter.took("jpeg", time.perf_counter() - started)
        with self._changed:
            self.last = shown
            listeners = self._listeners
        for listener in listeners:
            listener(shown)


def as_jpeg(picture: Picture) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "JPEG", quality=_QUALITY)
    return buffer.getvalue()


def from_jpeg(data: bytes, size: tuple[int, int]) -> Picture:
    """uint8 [H, W, 3] of `size` (width, height), fitted by scaling and cutting what is over. Raises OSError, or what
    Pillow raises, for what is no picture, ValueError for one of more than MOST_PIXELS."""
    from PIL import ImageOps

    try:
        opened = Image.open(io.BytesIO(data), formats=["JPEG"])
    except Image.DecompressionBombError as error:
        raise ValueError(str(error)) from error
    with opened:
        if opened.width * opened.height > MOST_PIXELS:
            raise ValueError(f"{opened.width}x{opened.height} pixels; at most {MOST_PIXELS}")
        return np.asarray(ImageOps.fit(opened.convert("RGB"), size))
