"""Principal axes shared by all runs, fitted and applied a few steps at a time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from sklearn.decomposition import IncrementalPCA

from halfstep.store.run import Float64, Latents, Run

AXES = 16
_BATCH = 2 * AXES  # states that one update of the fit sees
_STEPS_OF_A_RUN = 16  # evenly spaced over the run, first and last among them


@dataclass(frozen=True)
class SharedAxes:
    """Orthonormal `components` [p, D] around `center` [D], float32; `explained` [p] share of the variance of all states
    that went into the fit."""

    components: npt.NDArray[np.float32]
    center: npt.NDArray[np.float32]
    explained: Float64

    def project(self, latents: Latents) -> Float64:
        """Coordinates [n, p] of the states of a run, latent."""
        return np.array([self.components @ (state.reshape(-1) - self.center) for state in latents], np.float64).reshape(
            len(latents), len(self.components)
        )


def fit_axes(runs: Iterable[Run]) -> SharedAxes:
    """Fit by incremental PCA (Ross et al. 2008, doi:10.1007/s11263-007-0075-7, scikit-learn's IncrementalPCA): memory
    grows with the size of a state, not with the number of states or runs. At most 16 axes, fewer when there are fewer
    states."""
    batches = _batches(runs)
    first = next(batches)
    pca = IncrementalPCA(n_components=min(AXES, len(first) - 1, first.shape[1]), copy=False)
    pca.partial_fit(first)
    for batch in batches:
        pca.partial_fit(batch)
    return SharedAxes(
        pca.components_.astype(np.float32), pca.mean_.astype(np.float32), np.asarray(pca.explained_variance_ratio_)
    )


def _batches(runs: Iterable[Run]) -> Iterator[npt.NDArray[np.float32]]:
    """States of all runs, [_BATCH, D] at a time."""
    rows: list[npt.NDArray[np.float32]] = []
    for run in runs:
        places = np.unique(np.linspace(0, len(run) - 1, min(_STEPS_OF_A_RUN, len(run))).round().astype(int))
        for k in places:
            rows.append(run.latents[int(k)].reshape(-1))
            if len(rows) == _BATCH:
                yield np.stack(rows)
                rows = []
    if rows:
        yield np.stack(rows)
