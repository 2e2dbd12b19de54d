"""How far decoded values may be off: within a bound, or within the error of casting to a half type.

Errors are root-mean-squares. Axes: S states, C channels, N values of a channel.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from halfstep.errors import InputError
from halfstep.store.predictive.prediction import Float32, Float64, blocks

Fidelity = Literal["fp16", "bf16"]

_ROOM = 1.1  # of what a state aims at, which those after it make up for

MOST = 1.5  # times its own rounding error, of a channel of a state
STRICT = 1.0


@dataclass(frozen=True)
class Promise:
    """What a trajectory is encoded for. With `max_error`: no finite value is off by more. Else, with `fidelity`: over a
    group, the error is at most that of casting to that type, and in no channel of no state more than 1.5 times that of
    casting this channel of this state; with `strict` not more than that of casting. Without both, everything is exact.
    Raises InputError for a bound that is negative or not finite, and for other types."""

    max_error: float | None = None
    fidelity: Fidelity | None = "fp16"
    strict: bool = False

    def __post_init__(self) -> None:
        if self.max_error is not None and not 0 <= self.max_error < np.inf:
            raise InputError(f"max_error: got {self.max_error}; expected a finite number, 0 or more")
        if self.fidelity not in ("fp16", "bf16", None):
            raise InputError(f"fidelity: got {self.fidelity!r}; expected fp16, bf16 or None")

    @property
    def most(self) -> float:
        return STRICT if self.strict else MOST


class ErrorBudget:
    """How large the errors of a group's states may be. `states` [S, C, N] are in the order of coding."""

    def __init__(self, states: Float32, promise: Promise) -> None:
        self.promise = promise
        self._rounding = None
        if promise.max_error is None and promise.fidelity is not None:
            self._rounding = np.array([mean_square_rounding(state, promise.fidelity) for state in states])
            self._left = float(self._rounding.sum())
        self._aim = np.empty(0)  # mean squares of the state that errors() was last asked for
        self._spent: list[Float64] = []

    def errors(self, number: int) -> Float64 | None:
        """The root-mean-square errors [C] to aim at in state `number`; None where a bound or exactness is promised.
        What is left of the group's is shared by the states that are left, each up to its own most."""
        if self._rounding is None:
            return None
        most = self.promise.most**2 * self._rounding[number:]
        self._aim = np.minimum(most[0], _water_level(np.sort(most, axis=None), self._left))
        errors: Float64 = np.sqrt(self._aim)
        return errors

    def allows(self, number: int, mean_squares: Float64) -> Float64:
        """How far the bins of state `number` are to be narrowed [C], 1 for those that may stay: its channels and, among
        the states that are left, it itself must not be further off than promised."""
        if self._rounding is None:
            return np.ones(len(mean_squares))
        is_last = number + 1 == len(self._rounding)
        together = min(self._left, float(self._aim.sum()) * (1.0 if is_last else _ROOM))
        shares = np.minimum(1.0, _quotient(self.promise.most**2 * self._rounding[number], mean_squares))
        narrowing: Float64 = np.sqrt(np.minimum(shares, _quotient(together, mean_squares.sum())))
        return narrowing

    def spend(self, mean_squares: Float64) -> None:
        """Count the mean square errors [C] of the state that was coded."""
        if self._rounding is not None:
            self._left -= float(mean_squares.sum())
            self._spent.append(mean_squares.copy())

    @property
    def accuracy(self) -> tuple[float, ...]:
        """The errors of all that was coded, of the worst state and of the worst channel of a state, as shares of those
        of casting; NaN where none is promised."""
        if self._rounding is None:
            return (np.nan, np.nan, np.nan)
        spent = np.array(self._spent)
        parts = [
            (spent.sum(), self._rounding.sum()),
            (spent.sum(axis=1), self._rounding.sum(axis=1)),
            (spent, self._rounding),
        ]
        shares = [np.divide(x, y, out=np.zeros(np.shape(x)), where=np.asarray(y) > 0) for x, y in parts]
        return tuple(float(np.sqrt(np.max(share))) for share in shares)


def mean_square_rounding(state: Float32, fidelity: Fidelity) -> Float64:
    """Mean square error [C] of casting `state` [C, N] to a half type, over the values that stay finite in it."""
    totals, counts = np.zeros(len(state)), np.zeros(len(state))
    for block in blocks(state.shape):
        values = np.ascontiguousarray(state[block])
        error = rounded(values, fidelity)
        error -= values
        square = np.einsum("cn,cn->c", error, error).astype(np.float64)
        count = np.full(len(error), error.shape[1])
        if not np.isfinite(square).all():
            sound = np.isfinite(error)
            wide = np.where(sound, error, 0.0).astype(np.float64)  # whose squares have room
            square = np.einsum("cn,cn->c", wide, wide)
            count = sound.sum(axis=1)
        totals[block[0]] += square
        counts[block[0]] += count
    mean: Float64 = totals / np.maximum(counts, 1)
    return mean


def rounded(values: Float32, fidelity: Fidelity) -> Float32:
    """`values` rounded to the nearest of a half type, ties to even. Bits are cut off as integers because numpy converts
    to float16 one value at a time."""
    drop = 13 if fidelity == "fp16" else 16
    bits = values.view(np.uint32)
    kept = bits >> np.uint32(drop)
    kept &= np.uint32(1)
    kept += bits
    kept += np.uint32((1 << drop - 1) - 1)
    kept &= np.uint32(-(1 << drop) & 0xFFFFFFFF)
    result: Float32 = kept.view(np.float32)
    if fidelity == "fp16":
        magnitude = np.abs(values)
        subnormal = magnitude < 2.0**-14
        if subnormal.any():
            result[subnormal] = np.rint(values[subnormal] * np.float32(2.0**24)) * np.float32(2.0**-24)
        if not magnitude.max() <= 65504:  # or NaN among them
            result[np.abs(result) > 65504] = np.inf
    return result


def _water_level(most: Float64, amount: float) -> float:
    """The level L at which min(L, most) sums up to `amount`; `most` grows."""
    below = np.concatenate([[0.0], np.cumsum(most)[:-1]])
    above = len(most) - np.arange(len(most))
    filled = below + most * above  # the sum at each level of `most`
    place = int(np.searchsorted(filled, amount))
    if place == len(most):
        return float("inf")
    return max(0.0, float((amount - below[place]) / above[place]))


def _quotient(allowed: Any, found: Any) -> Any:
    """0 of 0 is 1: there is nothing to narrow."""
    return np.divide(allowed, found, out=np.ones(np.shape(found)), where=np.asarray(found) > 0)
