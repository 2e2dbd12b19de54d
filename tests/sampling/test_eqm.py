"""Sampling from EqM against the reference implementation's numbers."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from halfstep.errors import InputError
from halfstep.models import EqM
from halfstep.models.objectives import gradient_magnitude
from halfstep.precision import PrecisionPolicy, prepare
from halfstep.sampling import (
    GuidedField,
    MemoryRecorder,
    StoreRecorder,
    drive,
    energy_score,
    sample_eqm,
    sample_eqm_ode,
)
from halfstep.store import TrajectoryFormat, TrajectoryStore
from tests.support.golden_eqm import CONFIG, NUMBERS, X, Y, golden_model


def sampled(
    model: EqM, x: torch.Tensor, y: torch.Tensor, *, scale: float = 1.0, channels: int | None = None,
    recorders: Any = (), **options: Any,
) -> torch.Tensor:  # fmt: skip
    return drive(sample_eqm(GuidedField(model, y, scale, channels), x, **options), recorders)


def test_gd_is_the_references() -> None:
    sample = sampled(golden_model(), X, Y, sampler="gd", step_size=0.003, updates=5)
    torch.testing.assert_close(sample, NUMBERS["gd.eta0.003.steps6"], rtol=1e-4, atol=1e-5)


def test_ngd_with_guidance_is_the_references() -> None:
    sample = sampled(golden_model(), X, Y, sampler="ngd", step_size=0.0017, updates=5, scale=4.0, channels=3)
    torch.testing.assert_close(sample, NUMBERS["ngd.eta0.0017.mu0.3.steps6.cfg"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("options", [{}, {"uncond": False}, {"energy": "dot"}, {"energy": "l2", "num_frames": 2}])
@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_every_variant_by_its_definition(options: dict[str, Any], guidance: float) -> None:
    """Against a loop that calls the whole model at each step, with the gradient of the energies."""
    model = golden_model(**options)
    start = X if "num_frames" not in options else torch.stack([X, X.flip(0)], dim=2)
    x, velocity = start.clone(), torch.zeros_like(start)
    for k in range(4):
        at = x + 0.01 * 0.5 * velocity
        time = torch.full((3,), 1 + 0.01 * k)
        with torch.no_grad():
            velocity = model(at, time, Y) if guidance == 1 else model.guided(at, time, Y, guidance)
        x = x + 0.01 * velocity
    chosen: dict[str, Any] = {"sampler": "ngd", "step_size": 0.01, "momentum": 0.5, "updates": 4}
    sample = sampled(model, start, Y, **chosen, scale=guidance)
    torch.testing.assert_close(sample, x, rtol=1e-5, atol=1e-6)


def test_the_state_stays_fp32_under_a_half_model() -> None:
    """250 updates of 0.001 around one: a bf16 state would not move at all."""
    model = golden_model()
    exact = sampled(model, X, Y, sampler="gd", step_size=0.0005, updates=50)
    with torch.autocast("cpu", torch.bfloat16):
        half = sampled(model, X.bfloat16().float(), Y, sampler="gd", step_size=0.0005, updates=50)
    assert half.dtype == torch.float32
    moved = (exact - X).abs().mean()
    start = X.bfloat16().float()
    assert ((half - start) - (exact - X)).abs().mean() < 0.05 * moved


def test_every_state_can_be_recorded(tmp_path: Path) -> None:
    store = TrajectoryStore.create(tmp_path / "s")
    recorders = [StoreRecorder(store, f"r{i}", format=TrajectoryFormat(storage="fp32")) for i in range(3)]
    options: dict[str, Any] = {"sampler": "gd", "step_size": 0.003, "updates": 5}
    recorded = sampled(golden_model(), X, Y, **options, recorders=recorders)
    for recorder in recorders:
        recorder.finish()
    assert torch.equal(recorded, sampled(golden_model(), X, Y, **options))
    for i in range(3):
        run = store[f"r{i}"]
        assert run.sigmas == pytest.approx([1, 0.8, 0.6, 0.4, 0.2, 0])
        assert np.array_equal(run.latents[0], X[i].numpy())
        assert np.array_equal(run.latents[5], recorded[i].numpy())


def test_mistakes_are_named() -> None:
    options: dict[str, Any] = {"step_size": 0.1, "updates": 1}
    with pytest.raises(InputError, match="sampler: got 'adam'; expected gd or ngd"):
        sampled(golden_model(), X, Y, sampler="adam", **options)
    with pytest.raises(InputError, match="recorders: got 1 for 3 samples"):
        sampled(golden_model(), X, Y, sampler="gd", **options, recorders=[MemoryRecorder()])


def test_the_ode_follows_the_flow_it_was_trained_on() -> None:
    """For the exact field toward one point, c(gamma) (x1 - x0), the path is straight and ends there."""
    target = torch.randn(X.shape, generator=torch.Generator().manual_seed(1))

    class Exact(EqM):
        def forward(self, x: torch.Tensor, t: torch.Tensor, y: torch.Tensor, **_: Any) -> torch.Tensor:
            gamma = t.reshape(-1, 1, 1, 1)
            return gradient_magnitude(gamma) * (target - x) / (1 - gamma)  # x1 - x0 = (x1 - x) / (1 - gamma)

    model = Exact(**{**CONFIG, "uncond": False})
    for method in ("euler", "heun"):
        for start, x in ((0.0, X), (0.4, torch.lerp(X, target, 0.4))):
            recorders = [MemoryRecorder() for _ in X]
            states = sample_eqm_ode(GuidedField(model, Y), x, updates=5, method=method, start=start)
            sample = drive(states, recorders)
            torch.testing.assert_close(sample, target, rtol=1e-4, atol=1e-4)
            levels = [step.sigma for step in recorders[0].steps]
            np.testing.assert_allclose(levels, (1 - start) * np.linspace(1, 0, 6), atol=1e-12)
            halfway = torch.stack([recorder.steps[3].latent for recorder in recorders])
            torch.testing.assert_close(halfway, torch.lerp(x, target, 0.6), rtol=1e-4, atol=1e-4)


def test_samples_stop_when_their_field_is_small_and_cost_nothing_more() -> None:
    """A field that shrinks with the sample: each stops when its own has fallen below, as it would alone."""
    sizes: list[int] = []

    class Shrinking(EqM):
        def forward(self, x: torch.Tensor, t: torch.Tensor, y: torch.Tensor, **_: Any) -> torch.Tensor:
            sizes.append(len(x))
            return -x

    model = Shrinking(**CONFIG)
    x = torch.ones(3, *model.latent_shape) * torch.tensor([1.0, 4.0, 0.01]).reshape(-1, 1, 1, 1)
    recorders = [MemoryRecorder() for _ in x]
    chosen: dict[str, Any] = {"sampler": "gd", "step_size": 0.5, "updates": 20, "stop_below": 0.1}
    states = list(sample_eqm(GuidedField(model, Y), x, **chosen))
    sample = drive(states, recorders)
    # |f| is halved by each update: 4 -> below 0.1 at the 7th evaluation, 1 -> at the 5th, 0.01 at the first.
    assert [len(recorder.steps) - 1 for recorder in recorders] == [5, 7, 1]
    assert sizes == [3, 2, 2, 2, 2, 1, 1]
    assert [len(state.movers) for state in states] == [3, *sizes]
    assert torch.equal(states[0].latents, x)  # a state that was yielded stays as it was
    for number in range(3):
        alone = sampled(model, x[number : number + 1], Y[:1], **chosen)
        assert torch.equal(alone[0], sample[number])
        assert torch.equal(recorders[number].steps[-1].latent, sample[number])


def test_labels_are_composed() -> None:
    model = golden_model()
    pairs = torch.stack([Y, (Y + 1) % model.num_classes], dim=1)
    none = torch.full_like(Y, model.num_classes)
    time = torch.ones(len(X))
    with torch.no_grad():
        base, first, second = (model(X, time, y) for y in (none, pairs[:, 0], pairs[:, 1]))
    sample = sampled(model, X, pairs, sampler="gd", step_size=0.1, updates=1, scale=1.5)
    field = base + 1.5 * (first - base + second - base)
    torch.testing.assert_close(sample, X + 0.1 * field, rtol=1e-5, atol=1e-6)
    same = sampled(model, X, Y.unsqueeze(1), sampler="ngd", step_size=0.1, updates=3, scale=2.0)
    plain = sampled(model, X, Y, sampler="ngd", step_size=0.1, updates=3, scale=2.0)
    assert torch.equal(same, plain)


@pytest.mark.parametrize("preset", ["bf16-true", "bf16-mixed"])
def test_a_prepared_model_samples_near_fp32(preset: str) -> None:
    exact = sampled(golden_model(), X, Y, sampler="ngd", step_size=0.01, updates=20, scale=1.5)
    model = prepare(golden_model(), PrecisionPolicy.parse(preset))
    half = sampled(model, X, Y, sampler="ngd", step_size=0.01, updates=20, scale=1.5)
    assert half.dtype == torch.float32
    assert (half - exact).norm() < 0.02 * (exact - X).norm()  # what the sampler moved, to bf16's accuracy


def test_the_energy_of_data_is_that_of_the_model() -> None:
    model = golden_model(energy="dot")
    none = torch.full_like(Y, model.num_classes)
    with torch.no_grad():
        expected, _ = model.energy_and_field(X, torch.ones(len(X)), none)
    torch.testing.assert_close(energy_score(model, X), expected)
    with pytest.raises(InputError, match="has no energy"):
        energy_score(golden_model(), X)
