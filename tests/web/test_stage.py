"""The stage of a live world: the newest picture wins, and what it fails with is not lost."""

from __future__ import annotations

import io
import threading
from typing import Any

import numpy as np
import pytest
from PIL import Image

from halfstep.live import LiveEngine, Made
from halfstep.web.live.stage import Shown, Stage
from tests.live.worlds import CPU, HEIGHT, WIDTH, Mirror


class Held(Mirror):
    """Begins a picture, and goes on when it may."""

    def __init__(self) -> None:
        super().__init__()
        self.begun, self.may = threading.Semaphore(0), threading.Semaphore(0)

    def predict(self, network: Any, state: Any, given: Any, steps: int) -> Made:
        self.begun.release()
        self.may.acquire()
        return super().predict(network, state, given, steps)


def test_the_newest_picture_wins_and_those_it_was_not_in_time_for_are_counted() -> None:
    model, values, last = Held(), [], threading.Event()
    stage = Stage(LiveEngine(model, CPU, steps=1), most_per_second=1000)

    def keep(frame: Shown) -> None:
        values.append(round(float(np.asarray(Image.open(io.BytesIO(frame.jpeg))).mean())))
        if len(values) == 3:
            last.set()

    stage.listen(keep)
    stage.start()
    pictures = [np.full((HEIGHT, WIDTH, 3), 20 * k, np.uint8) for k in range(1, 6)]
    stage.see(pictures[0])
    model.begun.acquire()
    for picture in pictures[1:]:
        stage.see(picture)
    model.may.release(2)
    last.wait()
    stage.end()
    assert values == pytest.approx([128, 20, 100], abs=2)
    assert stage.facts()["dropped"] == 3


def test_what_a_stage_fails_with_is_raised_at_its_end() -> None:
    class Broken(Mirror):
        def predict(self, network: Any, state: Any, given: Any, steps: int) -> Made:
            raise MemoryError("no room for a frame")

    stage = Stage(LiveEngine(Broken(), CPU, steps=1), always=True)
    stage.start()
    while not stage.failed:
        threading.Event().wait(0.01)
    with pytest.raises(MemoryError, match="no room for a frame"):
        stage.end()
