"""The whole test of a model's precisions against its fp32: admission, one step, long walks, floor and controls.

Axes: W walks, N frames, L frames that are looked at, Q features, C channels, h w latents, H W pictures.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch

from halfstep.errors import NumericsError
from halfstep.live.drift.admission import Admission, admission_places, admit
from halfstep.live.drift.controls import fp8_like, frozen, gains_to_try, perturbed
from halfstep.live.drift.course import Course
from halfstep.live.drift.equivalence import ALPHA, Verdict
from halfstep.live.drift.free_running import (
    FEATURES,
    FeatureTest,
    Float,
    Looked,
    compare,
    features,
    first_not_finite,
    frames_until_apart,
    judge,
    margins,
)
from halfstep.live.drift.one_step import OneStep, added_error
from halfstep.live.frames import Network
from halfstep.live.variants import Variants
from halfstep.precision import tf32

_SHORT = 128  # frames of the floor's walks, and of those that a gain is tuned on
_SHOWN = (1, 64, 256, 512)

Strip = npt.NDArray[np.uint8]  # [frames, H, W, 3]


@dataclass(frozen=True)
class Settings:
    """`frames` of each walk; sampling `steps` of each frame."""

    frames: int = 512
    steps: int = 4

    @property
    def short(self) -> int:
        return min(_SHORT, self.frames)

    @property
    def shown(self) -> tuple[int, ...]:
        """The frames that are kept as pictures."""
        return tuple(number for number in _SHOWN if number <= self.frames)


@dataclass(frozen=True)
class Opened:
    """A precision, ready to be called. simulated: the device emulates it, so its arithmetic is simulated."""

    network: Network
    simulated: bool


Opener = Callable[[], AbstractContextManager[Opened]]


@contextmanager
def opened(variants: Variants, name: str) -> Iterator[Opened]:
    """The variants' network in that precision, within the block."""
    variants.use(name)
    try:
        yield Opened(variants.current, variants.simulated)
    finally:
        variants.close()


@dataclass(frozen=True)
class FreeRun:
    """Walks of a variant beside fp32's. tests: none where a frame, `not_finite`, broke them off. apart: for each walk
    the frame at which they were apart. features [L, Q], means over walks; pictures: of the first walk."""

    tests: tuple[FeatureTest, ...]
    apart: tuple[int | None, ...]
    not_finite: int | None
    features: Float
    pictures: Strip

    @property
    def verdict(self) -> Verdict:
        return judge(self.tests) if self.not_finite is None else "inferior"


@dataclass(frozen=True)
class PrecisionResult:
    simulated: bool
    one_step: OneStep
    free_run: FreeRun

    @property
    def verdict(self) -> Verdict:
        """Inferior where one of the tests says so, non-inferior where both do."""
        found = {self.one_step.verdict, self.free_run.verdict}
        if "inferior" in found:
            return "inferior"
        return "inconclusive" if "inconclusive" in found else "non-inferior"


@dataclass(frozen=True)
class Controls:
    """fp8: one step with its rounding noise; frozen: the test of motion of walks that stand still; gain: what every
    frame was multiplied by, and the walks."""

    fp8: OneStep
    frozen: FeatureTest
    gain: float
    gained: FreeRun

    @property
    def passed(self) -> tuple[str, ...]:
        """The controls that their tests took for fp32."""
        return tuple(
            name
            for name, passes in (
                ("fp8-like noise", self.fp8.verdict == "non-inferior"),
                ("frozen frames", self.frozen.p_within < ALPHA),
                (f"a gain of {self.gain:g}", self.gained.verdict == "non-inferior"),
            )
            if passes
        )


@dataclass(frozen=True)
class Drift:
    """What was found. Of a model that is not admitted there is the admission alone. floor: frames until slightly other
    contexts were apart in fp32, by perturbation and walk, in walks of `settings.short` frames. features [L, Q] and
    pictures: of fp32."""

    settings: Settings
    walks: int
    places: int
    looked: Looked
    admission: Admission
    precisions: Mapping[str, PrecisionResult] = field(default_factory=dict)
    controls: Controls | None = None
    floor: Mapping[str, tuple[int | None, ...]] = field(default_factory=dict)
    features: Float | None = None
    pictures: Strip | None = None

    @property
    def reasons(self) -> tuple[str, ...]:
        """Why nothing can be concluded, whatever the tests say."""
        passed = () if self.controls is None else self.controls.passed
        return (*self.admission.reasons, *(f"{name} passed the test that must reject it" for name in passed))

    def verdict_of(self, name: str) -> Verdict:
        return "inconclusive" if self.reasons else self.precisions[name].verdict

    @property
    def verdict(self) -> Verdict:
        """Inferior where one precision is, else inconclusive where one is."""
        found = {self.verdict_of(name) for name in self.precisions}
        if "inferior" in found:
            return "inferior"
        return "inconclusive" if self.reasons or "inconclusive" in found else "non-inferior"


def measure_drift(course: Course, exact: Network, openers: Mapping[str, Opener], settings: Settings) -> Drift:
    """Hold precisions, by name, against `exact`, the subject's network in fp32, without TF32. Raises NumericsError when
    that makes frames that are not finite."""
    with tf32(False), torch.no_grad():
        return _measure(course, exact, openers, settings)


def _measure(course: Course, exact: Network, openers: Mapping[str, Opener], settings: Settings) -> Drift:
    truth, frames, short, progress = course.truth, settings.frames, settings.short, course.progress
    places, looked = range(truth.places), Looked.of(frames)
    admitting = 2 * len(admission_places(len(places)))
    progress.start(admitting + (2 + len(openers)) * (len(places) + frames) + 2 * short)
    progress.show("fp32, one step")
    predicted = course.next_frames(exact, places)
    _require_finite(predicted)
    admission = admit(course, exact, predicted)
    found = Drift(settings, truth.walks, len(places), looked, admission)
    if admission.reasons:
        return found

    real = truth.latents[:, truth.context_size :]
    progress.show("fp32, walks")
    path = course.walk(exact, frames)
    _require_finite(path)
    base = features(course.subject, path, looked.numbers)
    results = {}
    for name, opener in openers.items():
        with opener() as variant:
            progress.show(f"{name}, one step")
            made = course.next_frames(variant.network, places)
            progress.show(f"{name}, walks")
            walked = course.walk(variant.network, frames)
        one_step = added_error(made, predicted, real)
        results[name] = PrecisionResult(
            variant.simulated, one_step, _free_run(course, walked, path, base, looked, settings)
        )
    progress.show("controls")
    controls = _controls(course, exact, predicted, path, base, looked, settings)
    progress.show("floor")
    return Drift(
        settings,
        truth.walks,
        len(places),
        looked,
        admission,
        results,
        controls,
        _floor(course, exact, path, short),
        base.mean(axis=0),
        _pictures(course, path, settings),
    )


def _controls(
    course: Course,
    exact: Network,
    predicted: torch.Tensor,
    path: torch.Tensor,
    base: Float,
    looked: Looked,
    settings: Settings,
) -> Controls:
    truth = course.truth
    with fp8_like(course.subject.network) as noisy:
        made = course.next_frames(noisy, range(truth.places))
    for gain in gains_to_try(course, exact, path, margins(base, looked), settings.short):
        walked = course.walk(exact, settings.frames, gain=path.new_full((truth.walks,), gain))
        gained = _free_run(course, walked, path, base, looked, settings)
        if not all(abs(test.change) <= test.margin for test in gained.tests) or gained.not_finite is not None:
            break
    return Controls(
        fp8=added_error(made, predicted, truth.latents[:, truth.context_size :]),
        frozen=compare(frozen(base, looked), base, looked)[FEATURES.index("motion")],
        gain=gain,
        gained=gained,
    )


def _free_run(
    course: Course, walked: torch.Tensor, path: torch.Tensor, base: Float, looked: Looked, settings: Settings
) -> FreeRun:
    broken = first_not_finite(walked)
    apart = frames_until_apart(walked, path)
    found = features(course.subject, walked, looked.numbers)
    tests = compare(found, base, looked) if broken is None else ()
    return FreeRun(tests, apart, broken, found.mean(axis=0), _pictures(course, walked, settings))


def _floor(course: Course, exact: Network, path: torch.Tensor, frames: int) -> dict[str, tuple[int | None, ...]]:
    """All perturbed walks as one batch."""
    starts = perturbed(course.truth.context(0))
    walks = list(range(course.truth.walks))
    walked = course.walk(exact, frames, walks=walks * len(starts), start=torch.cat(list(starts.values())))
    parts = walked.chunk(len(starts))
    return {name: frames_until_apart(part, path) for name, part in zip(starts, parts, strict=True)}


def _pictures(course: Course, path: torch.Tensor, settings: Settings) -> Strip:
    pixels = course.subject.pixels(path[0, list(settings.shown)]).float()
    shown = ((pixels.nan_to_num() + 1) * 127.5).round().clamp(0, 255).byte()
    return np.asarray(shown.permute(0, 2, 3, 1).cpu().numpy())


def _require_finite(frames: torch.Tensor) -> None:
    if not bool(torch.isfinite(frames).all()):
        raise NumericsError("fp32: the model makes frames that are not finite; the checkpoint is broken")
