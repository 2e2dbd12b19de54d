"""LiveEngine: a frame for every step, in a precision that may be changed while it runs."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from halfstep.engine import Ring
from halfstep.engine.meter import Meter
from halfstep.errors import InputError
from halfstep.live.frames import Action, FrameModel, Made, Picture
from halfstep.live.variants import POLICIES, Variants

_RING = 4
_COMPARED_EVERY = 8  # frames, for what is compared costs as much again


@dataclass(frozen=True)
class LiveFrame:
    """A frame and how it came about. `number`: since the reset with `seed`. `difference`: of its pixels from the fp32
    frame that follows from the same state with the same noise, root mean square in 8-bit steps; None where it was not
    measured. `problem`: why there was a reset instead of what was asked for. `skipped`: it is the last one again,
    because what was given had hardly changed."""

    picture: Picture
    number: int
    seed: int
    precision: str
    simulated: bool
    difference: float | None = None
    problem: str | None = None
    skipped: bool = False


class LiveEngine:
    """Steps through a FrameModel. All calls come from one thread; `facts` from any.

    precision: fp32, bf16 or fp16. steps: of each frame's sampling. skip_below: a picture that differs from the last one
    that was taken by less, root mean square in 8-bit steps, is not computed.
    """

    def __init__(
        self,
        model: FrameModel,
        device: torch.device,
        *,
        precision: str = "fp32",
        steps: int = 4,
        seed: int = 0,
        skip_below: float | None = None,
    ) -> None:
        self._model, self._device, self._skip_below = model, device, skip_below
        self._variants = Variants(model.network, device)
        self._ring = Ring(_RING, device)
        self.meter = Meter()
        self._seed, self._number, self._state, self._steps = seed, 0, None, steps
        self._last: LiveFrame | None = None
        self._given: Picture | None = None
        self.not_finite: dict[str, int] = {}  # frames, by precision
        self.set_steps(steps)
        self.set_precision(precision)

    def set_precision(self, name: str) -> None:
        """From the next frame on. Raises InputError for one that is not known."""
        if name not in POLICIES:
            raise InputError(f"precision: got {name!r}; a live model runs in {', '.join(POLICIES)}")
        self._variants.use(name)
        self.meter.forget()

    def set_steps(self, steps: int) -> None:
        """From the next frame on. Raises InputError for more or fewer than the model can do."""
        fewest, most = self._model.spec.steps
        if not fewest <= steps <= most:
            raise InputError(f"steps: got {steps}; the model makes a frame in {fewest} to {most}")
        self._steps = steps
        self.meter.forget()

    def reset(self, seed: int | None = None) -> LiveFrame:
        """Begin anew: the first frame of `seed`, or of the same one again."""
        self._seed = self._seed if seed is None else seed
        self._number, self._given = 0, None
        return self._show(self._model.begin(self._seed), None, None)

    @torch.no_grad()  # tensors of inference mode cannot be simulated
    def step(self, given: Action | Picture | None = None) -> LiveFrame:
        """The next frame, with what is given for it. One that is not finite is not shown: the walk begins anew, which
        the frame says. Raises InputError for a picture of another size."""
        if self._last is None:
            return self.reset()
        if isinstance(given, np.ndarray):
            self._require_size(given)
            if self._is_similar(given):
                self.meter.add("skipped")
                return replace(self._last, skipped=True, problem=None, difference=None)
        started = time.perf_counter()
        with self._variants.stream():
            made = self._model.predict(self._variants.current, self._state, given, self._steps)
            finite = bool(torch.isfinite(made.pixels).all())
            self.meter.took("predict", time.perf_counter() - started)
            if not finite:
                return self._begin_again(self._variants.name)
            difference = self._difference(made, given)
            self._number += 1
            return self._show(made, difference, None)

    def facts(self) -> dict[str, Any]:
        """What it did so far, and how long its stages take."""
        return {
            "frames": int(self.meter.total("frames")),
            "frames_per_second": round(self.meter.pace(), 2),
            "milliseconds": self.meter.latency(),
            "skipped": int(self.meter.total("skipped")),
            "not_finite": dict(self.not_finite),
            "precision": self._variants.name,
            "simulated": self._variants.simulated,
            "launches": self._variants.launches,
            "steps": self._steps,
            "seed": self._seed,
        }

    def close(self) -> None:
        self._variants.close()

    def _begin_again(self, precision: str) -> LiveFrame:
        self.not_finite[precision] = self.not_finite.get(precision, 0) + 1
        problem = f"frame {self._number + 1} was not finite in {precision}; the walk begins again"
        self._number, self._given = 0, None
        return self._show(self._model.begin(self._seed), None, problem)

    def _show(self, made: Made, difference: float | None, problem: str | None) -> LiveFrame:
        started = time.perf_counter()
        self._state = made.state
        picture = self._ring.fetch(_as_picture(made.pixels)).numpy()
        self.meter.took("fetch", time.perf_counter() - started)
        self.meter.add("frames")
        self.meter.came_out(1)
        name, simulated = self._variants.name, self._variants.simulated
        self._last = LiveFrame(picture, self._number, self._seed, name, simulated, difference, problem)
        return self._last

    def _difference(self, made: Made, given: Action | Picture | None) -> float | None:
        if self._variants.name == "fp32" or self._number % _COMPARED_EVERY:
            return None
        started = time.perf_counter()
        exact = self._model.predict(self._variants.exact, self._state, given, self._steps)
        apart = (_as_picture(exact.pixels).float() - _as_picture(made.pixels).float()).square().mean().sqrt()
        self.meter.took("compare", time.perf_counter() - started)
        return float(apart)

    def _require_size(self, picture: Picture) -> None:
        expected = (self._model.spec.height, self._model.spec.width, 3)
        if picture.shape != expected or picture.dtype != np.uint8:
            raise InputError(f"picture: got {picture.dtype} {list(picture.shape)}; expected uint8 {list(expected)}")

    def _is_similar(self, picture: Picture) -> bool:
        """Whether it is hardly another than the last one that was taken; otherwise it is the last one from now on."""
        before = self._given
        if self._skip_below is not None and before is not None:
            apart = np.sqrt(np.mean((picture.astype(np.float32) - before.astype(np.float32)) ** 2))
            if apart < self._skip_below:
                return True
        self._given = picture
        return False


def _as_picture(pixels: torch.Tensor) -> torch.Tensor:
    """uint8 [H, W, 3] of pixels [3, H, W] in [-1, 1]."""
    return ((pixels + 1) * 127.5).round().clamp(0, 255).byte().permute(1, 2, 0).contiguous()
