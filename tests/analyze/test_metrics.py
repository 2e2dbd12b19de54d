"""Metrics on paths whose answers are known by hand."""

import math
from dataclasses import replace

import numpy as np
import pytest

from halfstep.analyze.axes import fit_axes
from halfstep.analyze.metrics import METRICS, PROFILES, Path, profile_sigmas, summarize
from halfstep.store.run import Latents, Run

SHAPE = (4, 8, 8)
D = math.prod(SHAPE)


def as_run(states: np.ndarray, sigmas: np.ndarray | None = None, key: str = "a", **facts: object) -> Run:
    """A run of states [n, D]."""
    values = states.reshape(len(states), *SHAPE).astype(np.float32)
    sigmas = np.linspace(1, 0, len(states)) if sigmas is None else sigmas
    return Run(
        key,
        np.arange(len(states)),
        1000 * sigmas,
        sigmas,
        Latents(len(states), SHAPE, lambda k: values[k]),
        str(facts.get("prompt", "p")),
        facts.get("seed"),  # type: ignore[arg-type]
        {},
        (),
    )


def path_of(run: Run) -> Path:
    found = summarize(run)
    axes = fit_axes({run.key: run}).project(run.latents)
    return Path(found.gram, found.mean, found.variance, run.sigmas, axes, found.rms_errors)


def metric(name: str, path: Path) -> float:
    return METRICS[name].compute(path)


def test_a_straight_line_at_constant_speed() -> None:
    rng = np.random.default_rng(0)
    start, end = rng.standard_normal((2, D))
    run = as_run(start + np.linspace(0, 1, 41)[:, None] * (end - start))
    path, length = path_of(run), float(np.linalg.norm(end - start))
    expected = {
        "path_length": length,
        "displacement": length,
        "straightness": 1.0,
        "mean_speed": length,
        "mean_turning_angle": 0.0,
        "half_life": 0.5,
        "effective_dimension": 1.0,
        "final_variance": float(end.var()),
        "hull_volume": 0.0,
    }
    for name, value in expected.items():
        assert metric(name, path) == pytest.approx(value, rel=1e-4, abs=2e-3), name
    assert metric("mean_acceleration", path) < 1e-3 * length
    assert PROFILES["speed"].compute(path) == pytest.approx(np.full(40, length), rel=1e-4)
    assert PROFILES["distance_to_end"].compute(path) == pytest.approx(length * np.linspace(1, 0, 41), abs=1e-4)


def test_the_schedule_is_not_the_model() -> None:
    """The same line sampled at uneven noise levels has the same speed, length and half-life."""
    start, end = np.random.default_rng(0).standard_normal((2, D))
    sigmas = np.linspace(1, 0, 30) ** 2
    path = path_of(as_run(end + sigmas[:, None] * (start - end), sigmas))
    length = float(np.linalg.norm(end - start))
    assert PROFILES["speed"].compute(path) == pytest.approx(np.full(29, length), rel=1e-3)
    assert metric("half_life", path) == pytest.approx(0.5, abs=1e-4)
    assert PROFILES["step_distance"].compute(path).std() > 0.1 * length / 30


def test_a_circle() -> None:
    n, radius = 60, 3.0
    basis = np.linalg.qr(np.random.default_rng(0).standard_normal((D, 2)))[0].T
    angle = 2 * np.pi * np.arange(n + 1) / n
    path = path_of(as_run(radius * (np.cos(angle)[:, None] * basis[0] + np.sin(angle)[:, None] * basis[1])))
    assert metric("path_length", path) == pytest.approx(2 * n * radius * np.sin(np.pi / n), rel=1e-5)
    assert metric("displacement", path) == pytest.approx(0, abs=1e-3)
    assert metric("straightness", path) == pytest.approx(0, abs=1e-3)
    assert PROFILES["turning_angle"].compute(path) == pytest.approx(np.full(n - 1, 2 * np.pi / n), rel=1e-4)
    assert metric("effective_dimension", path) == pytest.approx(2, rel=0.01)
    # |dv / dsigma| of a circle run through in one unit of sigma: (2 pi)^2 radius, less the chords' error.
    assert metric("mean_acceleration", path) == pytest.approx((2 * np.pi) ** 2 * radius, rel=0.01)


def test_a_brownian_path() -> None:
    """Independent steps in many dimensions turn by a right angle and end sqrt(n) steps away."""
    n, step = 100, 0.1
    rng = np.random.default_rng(0)
    path = path_of(as_run(np.cumsum(np.vstack([np.zeros(D), step * rng.standard_normal((n, D))]), axis=0)))
    assert metric("mean_turning_angle", path) == pytest.approx(np.pi / 2, abs=0.02)
    assert metric("path_length", path) == pytest.approx(n * step * np.sqrt(D), rel=0.02)
    assert metric("straightness", path) == pytest.approx(1 / np.sqrt(n), rel=0.1)
    # Eigenvalues fall as 1 / k^2: (sum 1/k^2)^2 / sum 1/k^4 = 5/2.
    assert metric("effective_dimension", path) == pytest.approx(2.5, rel=0.2)


def test_volumes_of_known_shapes() -> None:
    rng = np.random.default_rng(0)
    basis = np.linalg.qr(rng.standard_normal((D, 3)))[0].T
    scales = np.array([5.0, 3.0, 1.0])
    gaussian = path_of(as_run((rng.standard_normal((4000, 3)) * scales) @ basis))
    assert metric("log_volume", gaussian) == pytest.approx(2 * np.log(scales).sum(), abs=0.1)
    corners = np.array([[x, y, z] for x in (0, 2) for y in (0, 3) for z in (0, 5)], float)
    assert metric("hull_volume", path_of(as_run(corners @ basis))) == pytest.approx(30, rel=1e-4)


def test_short_and_still_paths_have_no_answer_instead_of_a_wrong_one() -> None:
    two = path_of(as_run(np.random.default_rng(0).standard_normal((2, D))))
    assert metric("straightness", two) == pytest.approx(1)
    for name in ("mean_acceleration", "mean_turning_angle", "log_volume", "hull_volume"):
        assert math.isnan(metric(name, two)), name
    gram = np.ones((5, 5))
    still = Path(gram, np.zeros(5), np.ones(5), np.linspace(1, 0, 5), np.zeros((5, 3)), np.zeros(5))
    for name in ("straightness", "half_life", "effective_dimension", "mean_turning_angle"):
        assert math.isnan(metric(name, still)), name
    assert metric("path_length", still) == 0


@pytest.mark.parametrize("count", [2, 16, 17, 40])
def test_the_summary_is_what_all_states_at_once_give(count: int) -> None:
    states = np.random.default_rng(count).standard_normal((count, D)).astype(np.float32)
    found = summarize(as_run(states))
    exact = states.astype(np.float64)
    assert found.gram == pytest.approx(exact @ exact.T, rel=1e-12, abs=1e-9)
    assert found.mean == pytest.approx(exact.mean(axis=1), abs=1e-9)
    assert found.variance == pytest.approx(exact.var(axis=1), rel=1e-6)


def test_reading_holds_few_steps_at_once() -> None:
    """However long the run: each block of steps is read once and once more for each block before it."""
    asked: list[int] = []

    def read(k: int) -> np.ndarray:
        asked.append(k)
        return np.zeros(SHAPE, np.float32)

    summarize(replace(as_run(np.zeros((64, D))), latents=Latents(64, SHAPE, read)))
    assert len(asked) == 64 + 3 * 16 + 2 * 16 + 16


def test_shared_axes_are_the_principal_axes() -> None:
    rng = np.random.default_rng(0)
    basis = np.linalg.qr(rng.standard_normal((D, 4)))[0].T
    runs = {str(i): as_run((rng.standard_normal((30, 4)) * [9, 5, 2, 1]) @ basis, key=str(i)) for i in range(6)}
    shared = fit_axes(runs)
    overlap = np.abs(shared.components[:4] @ basis.T)
    assert overlap == pytest.approx(np.eye(4), abs=0.15)
    assert shared.explained[:4].sum() == pytest.approx(1, abs=1e-3)
    states = np.stack(list(runs["0"].latents)).reshape(30, -1)
    assert shared.project(runs["0"].latents) == pytest.approx((states - shared.center) @ shared.components.T, abs=1e-3)


def test_the_sketch_comes_close_to_all_of_the_variance_that_so_many_axes_can_have() -> None:
    """Of a spectrum that falls slowly, where single axes are not determined well. The oracle: the SVD of all states."""
    rng = np.random.default_rng(1)
    scales = 1 / np.arange(1, 101)
    runs = {
        str(i): as_run((rng.standard_normal((16, 100)) * scales) @ np.linalg.qr(rng.standard_normal((D, 100)))[0].T)
        for i in range(8)
    }
    shared = fit_axes(runs)
    states = np.concatenate([np.stack(list(run.latents)).reshape(16, -1) for run in runs.values()]).astype(np.float64)
    assert shared.center == pytest.approx(states.mean(axis=0), abs=1e-5)
    states -= states.mean(axis=0)
    values = np.linalg.svd(states, compute_uv=False) ** 2
    assert shared.components @ shared.components.T == pytest.approx(np.eye(16), abs=1e-4)
    captured = np.square(states @ shared.components.T).sum() / values.sum()
    assert captured > 0.97 * values[:16].sum() / values.sum()
    assert shared.explained.sum() == pytest.approx(captured, rel=0.03)


def test_axes_do_not_depend_on_the_order_of_runs() -> None:
    rng = np.random.default_rng(2)
    runs = {str(i): as_run(rng.standard_normal((9, D)), key=str(i)) for i in range(7)}
    shared, again = fit_axes(runs), fit_axes(dict(reversed(runs.items())))
    assert np.array_equal(shared.components, again.components)
    assert np.array_equal(shared.center, again.center)


@pytest.mark.parametrize("states", [np.zeros((5, D)), np.ones((2, D)), np.outer(np.arange(6), np.arange(D))])
def test_axes_of_states_without_spread(states: np.ndarray) -> None:
    shared = fit_axes({"a": as_run(states)})
    assert np.isfinite(shared.components).all()
    assert np.isfinite(shared.explained).all()
    assert shared.explained.sum() <= 1 + 1e-6


def test_profiles_lie_where_they_belong() -> None:
    sigmas = np.array([1.0, 0.6, 0.0])
    assert profile_sigmas(3, sigmas).tolist() == [1.0, 0.6, 0.0]
    assert profile_sigmas(2, sigmas).tolist() == [0.8, 0.3]
    assert profile_sigmas(1, sigmas).tolist() == [0.6]


def test_every_metric_says_what_it_is() -> None:
    for name, item in {**METRICS, **PROFILES}.items():
        assert item.formula, name
