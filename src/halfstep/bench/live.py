"""halfstep bench live: what the engine of a live world adds to its model, and how fast the shipped world is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from halfstep.bench.compare import document, in_turn
from halfstep.bench.memory import resident_mb
from halfstep.live import Action, LiveEngine
from halfstep.live.opening import open_walk
from halfstep.machine import open_device
from halfstep.progress import SILENT, Progress

_KEYS = (Action(forward=1), Action(forward=1, turn=1), Action(turn=1), Action(forward=1, turn=-1))
_HELD = 8  # frames of a key


@torch.no_grad()
def bench_live(
    *, frames: int = 100, rounds: int = 5, steps: int = 4, soak: int = 0, progress: Progress = SILENT
) -> dict[str, Any]:
    """Seconds of `frames` frames of the shipped world in `steps` sampling steps each, by the model alone and through
    the engine, in turn, in fp32 and in bf16 (simulated where it is not real, and then not timed).

    With `soak`, so many frames more: what resident memory (MB) does after the first tenth of them.
    """
    device = open_device("auto")
    model = open_walk(None, device)

    def alone() -> None:
        state = model.begin(0).state
        for number in range(frames):
            state = model.predict(model.network, state, _key(number), steps).state

    def through(engine: LiveEngine) -> Callable[[], None]:
        def run() -> None:
            engine.reset(0)
            for number in range(frames):
                engine.step(_key(number))

        return run

    engines = {name: LiveEngine(model, device, precision=name, steps=steps) for name in ("fp32", "bf16")}
    real = {name: engine for name, engine in engines.items() if not engine.facts()["simulated"]}
    cases: dict[str, Callable[[], float | None]] = {"model alone, fp32": alone}
    cases |= {f"engine, {name}": through(engine) for name, engine in real.items()}
    timings = in_turn(cases, rounds)
    facts: dict[str, Any] = {
        "frames": frames,
        "steps": steps,
        "frames_per_second": {name: round(frames / timing.median, 2) for name, timing in timings.items()},
        "engine_adds": round(timings["engine, fp32"].median / timings["model alone, fp32"].median - 1, 4),
    }
    if soak:
        facts |= {"soak": soak, **_soak(engines["fp32"], soak, progress)}
    for engine in engines.values():
        engine.close()
    return document("live", timings, **facts)


def _soak(engine: LiveEngine, frames: int, progress: Progress) -> dict[str, float]:
    engine.set_steps(1)
    engine.reset(0)
    progress.start(frames)
    resident = []
    for number in range(frames):
        engine.step(_key(number))
        progress.advance()
        if number % (frames // 10) == 0:
            resident.append(resident_mb())
    growth = max(resident[1:]) / resident[1] - 1
    return {"resident_mb": round(resident[1], 1), "growth_after_the_first_tenth": round(growth, 4)}


def _key(number: int) -> Action:
    return _KEYS[number // _HELD % len(_KEYS)]
