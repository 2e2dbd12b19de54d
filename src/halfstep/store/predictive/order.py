"""In which order the states of a group are coded, and from which others each is predicted.

The last states of a group come first, from those of the group before: only they hold a group to the one before it. The
rest is halved again and again, so that most states lie between two that are known, as the B-frames of video do.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise

import numpy as np
import numpy.typing as npt

TAIL = 3  # the last states of a group, to which the next group refers
_TAPS = 3  # on either side


@dataclass(frozen=True)
class Place:
    """Where a state lies in its group, and the `taps` that it is predicted from, the nearest first; those of the group
    before are negative, -1 is its last.

    Row k of `basis` [taps, taps] is tap k less the polynomial through the taps before it, at tap k: Newton's form.
    Weights of these differences can be rounded; weights of states that are nearly alike cannot.
    """

    number: int
    taps: tuple[int, ...]
    basis: npt.NDArray[np.float64]


def after_one(number: int) -> Place:
    """The place of a state that is predicted from one other, which is none of its group."""
    return Place(number, (), _newton((0,)))


@cache
def coding_order(count: int, before: int) -> tuple[Place, ...]:
    """The places of a group of `count` states in the order of coding, after `before` states or more (0: none)."""
    known = list(range(-min(before, TAIL), 0))
    order: list[Place] = []
    for number in _numbers(count, bool(before)):
        left = sorted((place for place in known if place < number), reverse=True)[:_TAPS]
        right = sorted(place for place in known if place > number)[:_TAPS]
        taps = tuple(sorted(left + right, key=lambda place: (abs(place - number), place)))
        order.append(Place(number, taps, _newton(taps)))
        known.append(number)
    return tuple(order)


def needed(counts: Sequence[int], wanted: Iterable[int]) -> list[set[int]]:
    """Which states of each group are decoded for the `wanted` ones: `counts` are the states of the groups."""
    starts = np.cumsum([0, *counts])
    groups: list[set[int]] = [set() for _ in counts]
    for state in wanted:
        group = int(np.searchsorted(starts, state, side="right")) - 1
        groups[group].add(state - int(starts[group]))
    for group in reversed(range(len(counts))):
        before = counts[group - 1] if group else 0
        for place in reversed(coding_order(counts[group], before)):
            if place.number in groups[group]:
                for tap in place.taps:
                    groups[group - (tap < 0)].add(tap + before if tap < 0 else tap)
    return groups


def _numbers(count: int, follows: bool) -> list[int]:
    first = [] if follows else [0]
    tail = list(range(count - 1, max(count - 1 - TAIL, len(first) - 1), -1))
    gaps = [(-1 if follows else 0, min(tail, default=count))]
    between: list[int] = []
    while gaps:
        for left, right in (gap for gap in gaps if gap[1] - gap[0] > 1):
            between.append((left + right) // 2)
        known = sorted({*first, *tail, *between, *([-1] if follows else [])})
        gaps = [gap for gap in pairwise(known) if gap[1] - gap[0] > 1]
    return [*first, *tail, *between]


def _newton(taps: tuple[int, ...]) -> npt.NDArray[np.float64]:
    basis = np.eye(len(taps))
    for k, tap in enumerate(taps):
        for j, other in enumerate(taps[:k]):
            weight = 1.0
            for third in taps[:k]:
                if third != other:
                    weight *= (tap - third) / (other - third)
            basis[k, j] = -weight
    return basis
