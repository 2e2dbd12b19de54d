"""Which models can show drift at all: one that hears neither its context nor the action passes every other test."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from halfstep.live.drift.course import Course
from halfstep.live.frames import Network

LEAST_GAIN_DB, LEAST_CONTEXT, LEAST_ACTION = 2.0, 0.3, 0.2
_EVERY = 4  # places, which is enough for shares of this size


@dataclass(frozen=True)
class Admission:
    """What one step in fp32 does, over all walks and every fourth place.

    gain_db: how much nearer the decoded prediction is to the true picture than the decoded last frame: 10 log10 of the
    ratio of mean squared errors. context: how much of a moved context comes back: with the context one frame later and
    the same action and noise, the change of the prediction over the change of the last frame of context. action: how
    far the opposite action moves the prediction, over the motion from the last frame to the true next one. Both in
    latents, root mean square.
    """

    gain_db: float
    context: float
    action: float

    @property
    def reasons(self) -> tuple[str, ...]:
        """Why nothing can be concluded; none where the model is admitted."""
        found = []
        if not self.gain_db >= LEAST_GAIN_DB:
            found.append(f"one step beats copying the last frame by {self.gain_db:.1f} dB; needs {LEAST_GAIN_DB:g}")
        if not self.context >= LEAST_CONTEXT:
            found.append(f"of a moved context {self.context:.2f} comes back in the prediction; needs {LEAST_CONTEXT}")
        if not self.action > LEAST_ACTION:
            found.append(
                f"the opposite action moves the frame by {self.action:.0%} of the motion; needs {LEAST_ACTION:.0%}"
            )
        return tuple(found)


def admission_places(places: int) -> range:
    return range(0, places, _EVERY)


def admit(course: Course, exact: Network, predicted: torch.Tensor) -> Admission:
    """The admission of a subject whose fp32 predictions at all places are `predicted` [W, P, C, h, w]."""
    truth, subject = course.truth, course.subject
    places = list(admission_places(truth.places))
    chosen = predicted[:, places]
    last = truth.latents[:, [place + truth.context_size - 1 for place in places]]
    following = [place + truth.context_size for place in places]
    errors, copying = 0.0, 0.0
    for number, place in enumerate(following):
        real = truth.pixels[:, place]
        errors += float((subject.pixels(chosen[:, number]).clamp(-1, 1) - real).square().mean())
        copying += float((subject.pixels(last[:, number]).clamp(-1, 1) - real).square().mean())
    later = course.next_frames(exact, places, context_later=1)
    opposite = course.next_frames(exact, places, opposite=True)
    moved = rms(truth.latents[:, following] - last)
    return Admission(
        gain_db=10 * math.log10(_share(copying, errors)) if copying else -math.inf,
        context=_share(rms(later - chosen), moved),
        action=_share(rms(opposite - chosen), moved),
    )


def rms(values: torch.Tensor) -> float:
    return float(values.double().square().mean().sqrt())


def _share(part: float, whole: float) -> float:
    """part / whole; nothing of nothing is nothing."""
    return part / whole if whole else math.inf if part else 0.0
