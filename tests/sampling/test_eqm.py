"""Sampling from EqM against the reference implementation's numbers."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from halfstep.errors import InputError
from halfstep.sampling import MemoryRecorder, StoreRecorder, sample_eqm
from halfstep.store import TrajectoryFormat, TrajectoryStore
from tests.models.test_eqm import NUMBERS, X, Y, golden_model


def test_gd_is_the_references() -> None:
    sample = sample_eqm(golden_model(), X, Y, sampler="gd", step_size=0.003, updates=5)
    torch.testing.assert_close(sample, NUMBERS["gd.eta0.003.steps6"], rtol=1e-4, atol=1e-5)


def test_ngd_with_guidance_is_the_references() -> None:
    sample = sample_eqm(
        golden_model(), X, Y, sampler="ngd", step_size=0.0017, updates=5, guidance_scale=4.0, guidance_channels=3
    )
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
    sample = sample_eqm(model, start, Y, **chosen, guidance_scale=guidance)
    torch.testing.assert_close(sample, x, rtol=1e-5, atol=1e-6)


def test_the_state_stays_fp32_under_a_half_model() -> None:
    """250 updates of 0.001 around one: a bf16 state would not move at all."""
    model = golden_model()
    exact = sample_eqm(model, X, Y, sampler="gd", step_size=0.0005, updates=50)
    with torch.autocast("cpu", torch.bfloat16):
        half = sample_eqm(model, X.bfloat16().float(), Y, sampler="gd", step_size=0.0005, updates=50)
    assert half.dtype == torch.float32
    moved = (exact - X).abs().mean()
    start = X.bfloat16().float()
    assert ((half - start) - (exact - X)).abs().mean() < 0.05 * moved


def test_every_state_can_be_recorded(tmp_path: Path) -> None:
    store = TrajectoryStore.create(tmp_path / "s")
    recorders = [StoreRecorder(store, f"r{i}", format=TrajectoryFormat(storage="fp32")) for i in range(3)]
    options: dict[str, Any] = {"sampler": "gd", "step_size": 0.003, "updates": 5}
    recorded = sample_eqm(golden_model(), X, Y, **options, recorder=recorders)
    for recorder in recorders:
        recorder.finish()
    assert torch.equal(recorded, sample_eqm(golden_model(), X, Y, **options))
    for i in range(3):
        run = store[f"r{i}"]
        assert run.sigmas == pytest.approx([1, 0.8, 0.6, 0.4, 0.2, 0])
        assert np.array_equal(run.latents[0], X[i].numpy())
        assert np.array_equal(run.latents[5], recorded[i].numpy())


def test_mistakes_are_named() -> None:
    options: dict[str, Any] = {"step_size": 0.1, "updates": 1}
    with pytest.raises(InputError, match="sampler: got 'adam'; expected gd or ngd"):
        sample_eqm(golden_model(), X, Y, sampler="adam", **options)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="recorder: got 1 for 3 samples"):
        sample_eqm(golden_model(), X, Y, sampler="gd", **options, recorder=MemoryRecorder())
