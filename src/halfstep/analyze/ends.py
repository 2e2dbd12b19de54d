"""The last states of all runs in all of latent space: their inner products, read a few runs at a time."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from halfstep.store.run import Float32, Float64, Run

_AT_ONCE = 64 << 20  # bytes of states held at once, twice
_COLUMNS = 1 << 16  # values of a state that are float64 at once


@dataclass(frozen=True)
class Ends:
    """products: [n, n] inner products of the last states, from a center all share; errors: [n] lengths of what their
    rounding may be off, latent; places: where each run is."""

    products: Float64
    errors: Float64
    places: dict[str, int]

    def of(self, keys: Sequence[str]) -> Float64:
        """Inner products [k, k] of the last states of some runs."""
        chosen = [self.places[key] for key in keys]
        return self.products[np.ix_(chosen, chosen)]

    def errors_of(self, keys: Sequence[str]) -> Float64:
        """`errors` [k] of some runs."""
        return self.errors[[self.places[key] for key in keys]]


def last_states(runs: Mapping[str, Run], center: Float64, rms_errors: Mapping[str, float]) -> Ends:
    """Read the last state of every run; `rms_errors` are those of its values."""
    keys = sorted(runs)
    at_once = max(1, _AT_ONCE // (4 * center.size))
    blocks = [keys[start : start + at_once] for start in range(0, len(keys), at_once)]
    products = np.zeros((len(keys),) * 2)
    for i, block in enumerate(blocks):
        states = _read(runs, block, center)
        for j in range(i, len(blocks)):
            others = states if i == j else _read(runs, blocks[j], center)
            part = sum(a @ b.T for a, b in zip(_columns(states), _columns(others), strict=True))
            rows = slice(i * at_once, i * at_once + len(block))
            columns = slice(j * at_once, j * at_once + len(blocks[j]))
            products[rows, columns] = part
            products[columns, rows] = np.transpose(part)
    errors = np.array([rms_errors[key] for key in keys]) * math.sqrt(center.size)
    return Ends(products, errors, {key: place for place, key in enumerate(keys)})


def _read(runs: Mapping[str, Run], keys: Sequence[str], center: Float64) -> Float32:
    states = np.empty((len(keys), center.size), np.float32)
    for row, key in zip(states, keys, strict=True):
        np.subtract(runs[key].latents[-1].reshape(-1), center, out=row)
    return states


def _columns(states: Float32) -> Iterator[Float64]:
    for start in range(0, states.shape[1], _COLUMNS):
        yield states[:, start : start + _COLUMNS].astype(np.float64)
