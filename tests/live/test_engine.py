"""LiveEngine: the same bits from the same seed, precision changed on the way, frames that are not finite."""

from __future__ import annotations

import re
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from torch.utils._python_dispatch import _get_current_dispatch_mode

from halfstep.errors import InputError
from halfstep.live import STILL, Action, LiveEngine
from tests.live.worlds import CPU, HEIGHT, WIDTH, Corridor, Mirror

FORWARD = Action(forward=1)


def test_frames_follow_from_actions() -> None:
    engine = LiveEngine(Corridor(), CPU)
    frames = [engine.reset(3), engine.step(FORWARD), engine.step(FORWARD), engine.step(STILL), engine.step(None)]
    values = [(0.03 + 0.1 * forward + 1) * 127.5 for forward in (0, 1, 2, 2, 2)]
    assert [frame.picture.mean() for frame in frames] == pytest.approx(values, abs=0.51)
    assert [frame.number for frame in frames] == [0, 1, 2, 3, 4]
    assert frames[1].picture.shape == (HEIGHT, WIDTH, 3) and frames[1].picture.dtype == np.uint8
    assert {frame.seed for frame in frames} == {3}
    assert engine.facts()["frames"] == 5 and set(engine.facts()["milliseconds"]) == {"predict", "fetch"}


def test_a_step_before_any_reset_is_the_first_frame() -> None:
    engine = LiveEngine(Corridor(), CPU, seed=5)
    assert engine.step(FORWARD).number == 0 and engine.step(FORWARD).number == 1


def test_a_reset_with_a_seed_gives_the_same_bits() -> None:
    engine = LiveEngine(Corridor(), CPU)

    def walk() -> list[bytes]:
        return [engine.reset(7).picture.tobytes(), *(engine.step(FORWARD).picture.tobytes() for _ in range(4))]

    first = walk()
    engine.reset(8)
    assert walk() == first


@pytest.mark.parametrize("name", ["bf16", "fp16"])
def test_precision_is_changed_while_it_runs_and_its_difference_shown(name: str) -> None:
    engine = LiveEngine(Corridor(), CPU)
    engine.reset()
    exact = [engine.step(FORWARD) for _ in range(3)]
    assert {frame.precision for frame in exact} == {"fp32"} and exact[0].difference is None
    engine.set_precision(name)
    half = [engine.step(FORWARD) for _ in range(14)]
    assert {frame.precision for frame in half} == {name}
    compared = [frame for frame in half if frame.difference is not None]
    assert [frame.number for frame in compared] == [9, 17]  # every eighth
    assert all(0 <= frame.difference < 3 for frame in compared if frame.difference is not None)
    engine.set_precision("fp32")
    assert engine.step(FORWARD).difference is None
    engine.close()


def test_an_engine_may_be_made_in_another_thread_than_it_runs_in() -> None:
    """As the command does it; a simulation is of one thread."""
    engines = [LiveEngine(Corridor(), CPU, precision=name) for name in ("fp16", "bf16")]

    def run() -> list[str]:
        found = []
        for engine in engines:
            for name in (None, "fp32", "fp16", "bf16", "fp16"):
                if name is not None:
                    engine.set_precision(name)
                engine.step(FORWARD)
                found.append(engine.step(FORWARD).precision)
            engine.close()
        return found

    with ThreadPoolExecutor(1) as pool:
        found = pool.submit(run).result()
    assert found == ["fp16", "fp32", "fp16", "bf16", "fp16", "bf16", "fp32", "fp16", "bf16", "fp16"]
    assert _get_current_dispatch_mode() is None


def test_a_frame_that_is_not_finite_begins_again_and_is_counted() -> None:
    engine = LiveEngine(Corridor(broken=3), CPU, seed=2)
    engine.reset()
    frames = [engine.step(FORWARD) for _ in range(5)]
    assert frames[2].problem == "frame 3 was not finite in fp32; the walk begins again"
    assert [frame.number for frame in frames] == [1, 2, 0, 1, 2]
    assert frames[2].picture.tobytes() == engine.reset().picture.tobytes()
    assert engine.facts()["not_finite"] == {"fp32": 1}


def test_pictures_that_hardly_change_are_skipped() -> None:
    engine = LiveEngine(Mirror(), CPU, steps=2, skip_below=2.0)
    engine.reset()
    dark, light = np.full((HEIGHT, WIDTH, 3), 40, np.uint8), np.full((HEIGHT, WIDTH, 3), 90, np.uint8)
    shown = [engine.step(picture) for picture in (dark, dark + 1, light, light, dark)]
    assert [frame.skipped for frame in shown] == [False, True, False, True, False]
    assert [int(frame.picture[0, 0, 0]) for frame in shown] == [40, 40, 90, 90, 40]
    assert engine.facts()["skipped"] == 2


def test_what_cannot_be_is_refused() -> None:
    engine = LiveEngine(Mirror(), CPU, steps=2)
    with pytest.raises(InputError, match=re.escape(f"got uint8 [3, 3, 3]; expected uint8 [{HEIGHT}, {WIDTH}, 3]")):
        engine.reset()
        engine.step(np.zeros((3, 3, 3), np.uint8))
    with pytest.raises(InputError, match="got 'int8'; a live model runs in fp32, bf16, fp16"):
        engine.set_precision("int8")
    with pytest.raises(InputError, match="got 9; the model makes a frame in 1 to 2"):
        engine.set_steps(9)
    with pytest.raises(InputError, match="the model makes a frame in 1 to 2"):
        LiveEngine(Mirror(), CPU, steps=4)
