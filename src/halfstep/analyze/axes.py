"""Principal axes shared by all runs, fitted and applied a few steps at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from halfstep.store.run import Float64, Latents, Run

AXES = 16
_SKETCH = 2 * AXES  # directions that are followed
_BATCH = 32  # states that are in memory at once
_TOGETHER = 16  # states that are projected together; the codec's group
_COLUMNS = 1 << 14  # values of a state that are float64 at once
_STEPS_OF_A_RUN = 16  # evenly spaced over the run, first and last among them

Float32 = npt.NDArray[np.float32]


@dataclass(frozen=True)
class SharedAxes:
    """Orthonormal `components` [p, D] around `center` [D], zeros where the states have no more directions;
    `explained` [p] share of the variance of all states that went into the fit."""

    components: Float64
    center: Float64
    explained: Float64

    def project(self, latents: Latents) -> Float64:
        """Coordinates [n, p] of the states of a run, latent. In float64: a straight run must stay straight to the last
        digit that its states have."""
        coordinates = np.zeros((len(latents), len(self.components)))
        for start in range(0, len(latents), _TOGETHER):
            rows = slice(start, start + _TOGETHER)
            states = latents[rows].reshape(-1, self.center.size)
            for first in range(0, self.center.size, _COLUMNS):
                columns = slice(first, first + _COLUMNS)
                coordinates[rows] += (states[:, columns] - self.center[columns]) @ self.components[:, columns].T
        return coordinates


def fit_axes(runs: Mapping[str, Run]) -> SharedAxes:
    """Fit by a randomized sketch of the covariance C of the states (Halko et al. 2011, doi:10.1137/090771806, section
    5.5: C ~ CQ (Q'CQ)^-1 (CQ)' for a random basis Q of what C reaches). At most 16 axes, fewer when there are fewer
    states. It reads the states twice, in the order of the runs' names, and draws from a fixed seed: the order of `runs`
    changes nothing. Memory grows with the size of a state, not with the number of states or runs."""
    names = sorted(runs)
    states = sum(len(_places(runs[name])) for name in names)
    draws = np.random.default_rng(0).standard_normal((states, min(_SKETCH, states)))
    size = int(np.prod(runs[names[0]].latents.shape[1:]))
    center, reached, done = np.zeros(size), np.zeros((draws.shape[1], size)), 0
    for batch in _batches(runs, names):
        center += batch.sum(axis=0, dtype=np.float64)
        reached += draws[done : done + len(batch)].T.astype(np.float32) @ batch
        done += len(batch)
    center /= states
    reached -= draws.sum(axis=0)[:, None] * center
    basis = np.linalg.qr(reached.T)[0].T.astype(np.float32)  # [k, D]
    middle, image, total = np.zeros((len(basis),) * 2), np.zeros(basis.shape), 0.0
    for batch in _batches(runs, names):
        batch -= center.astype(np.float32)
        coordinates = batch @ basis.T
        middle += coordinates.T.astype(np.float64) @ coordinates.astype(np.float64)
        image += coordinates.T @ batch
        total += float(np.einsum("nd,nd->", batch, batch, dtype=np.float64))
    found, variances = _nystrom(middle, image)
    count = min(AXES, states - 1, size)
    components, explained = np.zeros((count, size)), np.zeros(count)
    there = min(count, len(found))
    components[:there] = found[:there]
    explained[:there] = variances[:there] / max(total, 1e-300)
    return SharedAxes(components, center, explained)


def _nystrom(middle: Float64, image: Float64) -> tuple[Float64, Float64]:
    """Eigenvectors [k, D] and eigenvalues, largest first, of image' middle^-1 image."""
    values, vectors = np.linalg.eigh(middle)
    kept = values > 1e-12 * max(values[-1], 1e-300)
    root = (vectors[:, kept] / np.sqrt(values[kept])).T @ image  # root' root is the matrix
    inner, turn = np.linalg.eigh(root @ root.T)
    inner, turn = np.maximum(inner[::-1], 0.0), turn[:, ::-1]
    lengths = np.sqrt(inner)
    components = np.divide(turn.T @ root, lengths[:, None], out=np.zeros_like(root), where=lengths[:, None] > 0)
    # Which way an axis points is free; the largest of its parts is made positive, so that it is always the same.
    largest = components[np.arange(len(components)), np.abs(components).argmax(axis=1)]
    return components * np.where(largest < 0, -1.0, 1.0)[:, None], inner


def _places(run: Run) -> npt.NDArray[np.int64]:
    return np.unique(np.linspace(0, len(run) - 1, min(_STEPS_OF_A_RUN, len(run))).round().astype(np.int64))


def _batches(runs: Mapping[str, Run], names: list[str]) -> Iterator[Float32]:
    """States of all runs, up to [_BATCH, D] at a time."""
    rows: list[Float32] = []
    for name in names:
        for k in _places(runs[name]):
            rows.append(runs[name].latents[int(k)].reshape(-1))
            if len(rows) == _BATCH:
                yield np.stack(rows)
                rows = []
    if rows:
        yield np.stack(rows)
