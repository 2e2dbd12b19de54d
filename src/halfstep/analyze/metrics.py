"""What a sampling run did, as numbers: pure functions of the inner products between its states.

All geometry of a path x_0 ... x_{n-1} is in its Gram matrix G[k, l] = <x_k, x_l> (float64), which is small and computed
once, reading a few steps at a time. Units: "latent" is the unit of the latents, "sigma" that of the noise level. A
metric that a run is too short for, or that is 0/0, is NaN.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from halfstep.store.run import Float64, Latents, Run

_BLOCK = 16  # steps held at once, twice; the codec's group
_COLUMNS = 1 << 16  # values of a step that are float64 at once


@dataclass(frozen=True)
class Path:
    """A run as the metrics see it. gram: [n, n]; mean, variance: [n] over the values of each state; sigmas: [n] noise
    levels; axes: [n, p] coordinates on principal axes shared by all runs. rms_errors: [n] root-mean-square errors of
    the values of each state, latent. spare: variance to take off the coordinates, latent^2."""

    gram: Float64
    mean: Float64
    variance: Float64
    sigmas: Float64
    axes: Float64
    rms_errors: Float64
    spare: float = 0.0


@dataclass(frozen=True)
class Summary:
    """What of a run's states does not need other runs, as in Path; size: values of a state."""

    gram: Float64
    mean: Float64
    variance: Float64
    rms_errors: Float64
    size: int
    largest: float  # magnitude of a value


def summarize(run: Run) -> Summary:
    """Read the states of `run` once, holding two blocks of steps at a time."""
    latents, count = run.latents, len(run)
    gram = np.zeros((count, count))
    mean, variance, errors = np.zeros(count), np.zeros(count), np.zeros(count)
    largest = 0.0
    for first in range(0, count, _BLOCK):
        block = _rows(latents, first)
        for k, state in enumerate(block, start=first):
            mean[k] = state.mean(dtype=np.float64)
            variance[k] = np.square(state - mean[k], dtype=np.float64).mean()
            errors[k] = run.rounding.rms(state)
            largest = max(largest, float(np.abs(state).max(initial=0.0)))
        for second in range(first, count, _BLOCK):
            other = block if second == first else _rows(latents, second)
            products = _inner_products(block, other)
            gram[first : first + len(block), second : second + len(other)] = products
            gram[second : second + len(other), first : first + len(block)] = products.T
    return Summary(gram, mean, variance, errors, math.prod(latents.shape[1:]), largest)


def _rows(latents: Latents, first: int) -> npt.NDArray[np.float32]:
    block = latents[first : first + _BLOCK]
    return block.reshape(len(block), -1)


def _inner_products(a: npt.NDArray[np.float32], b: npt.NDArray[np.float32]) -> Float64:
    total = np.zeros((len(a), len(b)))
    for start in range(0, a.shape[1], _COLUMNS):
        columns = slice(start, start + _COLUMNS)
        total += a[:, columns].astype(np.float64) @ b[:, columns].astype(np.float64).T
    return total


def squared_distances(gram: Float64) -> Float64:
    """|x_k - x_l|^2 = G_kk + G_ll - 2 G_kl, [n, n], latent^2."""
    diagonal = np.diag(gram)
    return np.maximum(diagonal[:, None] + diagonal[None, :] - 2 * gram, 0.0)


def _displacements(gram: Float64) -> Float64:
    """Inner products of the displacements u_k = x_{k+1} - x_k, [n - 1, n - 1], latent^2."""
    return np.diff(np.diff(gram, axis=0), axis=1)


# --- along the path ---------------------------------------------------------------------------------------------------


def step_distance(path: Path) -> Float64:
    """|x_{k+1} - x_k|, [n - 1], latent."""
    return np.sqrt(np.maximum(np.diag(_displacements(path.gram)), 0.0))


def speed(path: Path) -> Float64:
    """|x_{k+1} - x_k| / |sigma_{k+1} - sigma_k|, [n - 1], latent per sigma: of the model, not of the schedule."""
    return _divide(step_distance(path), np.abs(np.diff(path.sigmas)))


def acceleration(path: Path) -> Float64:
    """|v_{k+1} - v_k| / (|sigma_{k+2} - sigma_k| / 2) with velocities v = dx / dsigma, [n - 2], latent per sigma^2."""
    inner = _displacements(path.gram)
    change = np.diff(path.sigmas)
    velocities = _divide(inner, change[:, None] * change[None, :])
    difference = np.diag(velocities)[:-1] + np.diag(velocities)[1:] - 2 * np.diag(velocities, 1)
    return _divide(np.sqrt(np.maximum(difference, 0.0)), np.abs(path.sigmas[2:] - path.sigmas[:-2]) / 2)


def turning_angle(path: Path) -> Float64:
    """arccos(<u_k, u_{k+1}> / (|u_k| |u_{k+1}|)) of displacements in a row, [n - 2], radians in [0, pi]."""
    inner = _displacements(path.gram)
    lengths = np.sqrt(np.maximum(np.diag(inner), 0.0))
    return np.arccos(np.clip(_divide(np.diag(inner, 1), lengths[:-1] * lengths[1:]), -1, 1))


def distance_to_end(path: Path) -> Float64:
    """|x_k - x_{n-1}|, [n], latent."""
    return np.sqrt(squared_distances(path.gram)[:, -1])


def state_mean(path: Path) -> Float64:
    """Mean of the values of each state, [n], latent."""
    return path.mean


def state_variance(path: Path) -> Float64:
    """Variance of the values of each state, [n], latent^2."""
    return path.variance


# --- one number a run -------------------------------------------------------------------------------------------------


def path_length(path: Path) -> float:
    """sum_k |x_{k+1} - x_k|, latent."""
    return float(step_distance(path).sum())


def displacement(path: Path) -> float:
    """|x_{n-1} - x_0|, latent."""
    return float(distance_to_end(path)[0])


def straightness(path: Path) -> float:
    """Displacement / path length, in [0, 1]; 1 is a straight line (Batschelet 1981, Circular Statistics in Biology)."""
    return _ratio(displacement(path), path_length(path))


def mean_speed(path: Path) -> float:
    """Path length / |sigma_{n-1} - sigma_0|, latent per sigma."""
    return _ratio(path_length(path), abs(float(path.sigmas[-1] - path.sigmas[0])))


def mean_acceleration(path: Path) -> float:
    """Mean of `acceleration` over the steps, latent per sigma^2."""
    return _mean(acceleration(path))


def mean_turning_angle(path: Path) -> float:
    """Mean of `turning_angle` over the steps, radians; pi/2 for independent steps in many dimensions."""
    return _mean(turning_angle(path))


def half_life(path: Path) -> float:
    """How much of the noise range is spent when the distance to the end has halved: (sigma_0 - sigma_h) / (sigma_0 -
    sigma_{n-1}), in [0, 1], between steps by linear interpolation; 0.5 for a straight line at constant speed."""
    distances = distance_to_end(path)
    if len(distances) < 2 or distances[0] == 0:
        return float("nan")
    after = int(np.flatnonzero(distances <= distances[0] / 2)[0])
    share = (distances[after - 1] - distances[0] / 2) / (distances[after - 1] - distances[after])
    sigma = path.sigmas[after - 1] + share * (path.sigmas[after] - path.sigmas[after - 1])
    return _ratio(float(path.sigmas[0] - sigma), float(path.sigmas[0] - path.sigmas[-1]))


def final_variance(path: Path) -> float:
    """Variance of the values of the last state, latent^2."""
    return float(path.variance[-1])


def spectrum(path: Path) -> Float64:
    """Shares of the eigenvalues of the covariance of the run's states, largest first, [n - 1]; sums to 1. The nonzero
    eigenvalues of the covariance are those of the centered Gram matrix / (n - 1)."""
    centered = path.gram - path.gram.mean(axis=0) - path.gram.mean(axis=1)[:, None] + path.gram.mean()
    values = np.maximum(np.linalg.eigvalsh(centered)[::-1][:-1], 0.0)
    return _divide(values, values.sum())


def effective_dimension(path: Path) -> float:
    """Participation ratio (sum l)^2 / sum l^2 of the eigenvalues l of the covariance of the run's states, from 1 to
    n - 1 (Gao et al. 2017, doi:10.1101/214262)."""
    shares = spectrum(path)
    return _ratio(1.0, float(np.square(shares).sum()))


def log_volume(path: Path) -> float:
    """log det of the covariance of the run's coordinates on the first three shared principal axes, log latent^6. The
    shared axes make runs comparable; needs more than three states."""
    if not _has_volume(path):
        return float("nan")
    eigenvalues = np.linalg.eigvalsh(np.cov(path.axes[:, :VOLUME_AXES].T)) - path.spare
    return float(np.log(eigenvalues).sum()) if eigenvalues[0] > 0 else float("nan")


def hull_volume(path: Path) -> float:
    """Volume of the convex hull of the run's coordinates on the first three shared principal axes, latent^3."""
    from scipy.spatial import ConvexHull, QhullError

    if not _has_volume(path):
        return float("nan")
    eigenvalues = np.linalg.eigvalsh(np.cov(path.axes[:, :VOLUME_AXES].T))
    if eigenvalues[0] <= path.spare:
        return 0.0
    try:
        volume = float(ConvexHull(path.axes[:, :VOLUME_AXES]).volume)
    except QhullError:  # all points in one plane
        return 0.0
    return volume * math.sqrt(float(np.prod(1 - path.spare / eigenvalues)))


def _has_volume(path: Path) -> bool:
    return len(path.axes) > VOLUME_AXES and path.axes.shape[1] >= VOLUME_AXES


VOLUME_AXES = 3


@dataclass(frozen=True)
class Metric:
    """A metric by name: its function, its unit, and what it is in one line of words and formula."""

    compute: Callable[[Path], float]
    unit: str

    @property
    def formula(self) -> str:
        return " ".join((self.compute.__doc__ or "").split())


@dataclass(frozen=True)
class Profile:
    """A quantity along the path: its function and its unit."""

    compute: Callable[[Path], Float64]
    unit: str

    @property
    def formula(self) -> str:
        return " ".join((self.compute.__doc__ or "").split())


METRICS: dict[str, Metric] = {
    "path_length": Metric(path_length, "latent"),
    "displacement": Metric(displacement, "latent"),
    "straightness": Metric(straightness, ""),
    "mean_speed": Metric(mean_speed, "latent/sigma"),
    "mean_acceleration": Metric(mean_acceleration, "latent/sigma^2"),
    "mean_turning_angle": Metric(mean_turning_angle, "rad"),
    "half_life": Metric(half_life, ""),
    "final_variance": Metric(final_variance, "latent^2"),
    "effective_dimension": Metric(effective_dimension, ""),
    "log_volume": Metric(log_volume, "log latent^6"),
    "hull_volume": Metric(hull_volume, "latent^3"),
}

# In words, with the quantities of a group that are compared beside them.
METRIC_NAMES = {
    **{name: name.replace("_", " ") for name in METRICS},
    "dispersion": "dispersion of the results",
    "dispersion_on_axes": "dispersion of the results on the axes",
}

PROFILES: dict[str, Profile] = {
    "step_distance": Profile(step_distance, "latent"),
    "speed": Profile(speed, "latent/sigma"),
    "acceleration": Profile(acceleration, "latent/sigma^2"),
    "turning_angle": Profile(turning_angle, "rad"),
    "distance_to_end": Profile(distance_to_end, "latent"),
    "mean": Profile(state_mean, "latent"),
    "variance": Profile(state_variance, "latent^2"),
}


def profile_sigmas(count: int, sigmas: Float64) -> Float64:
    """Where the `count` values of a profile lie: at the states' noise levels, between two, or at the inner states."""
    if count == len(sigmas):
        return sigmas
    if count == len(sigmas) - 1:
        return (sigmas[:-1] + sigmas[1:]) / 2
    return sigmas[1:-1]


def _divide(a: Float64, b: Float64 | float) -> Float64:
    with np.errstate(divide="ignore", invalid="ignore"):
        quotient = np.asarray(a / b)
    return np.where(np.isfinite(quotient), quotient, np.nan)


def _ratio(a: float, b: float) -> float:
    quotient = a / b if b != 0 else float("nan")
    return quotient if math.isfinite(quotient) else float("nan")


def _mean(values: Float64) -> float:
    return float(values.mean()) if values.size else float("nan")
