"""Objectives against the reference implementations' numbers."""

import math
from typing import Any

import pytest
import torch
from diffusers.schedulers.scheduling_ddpm import rescale_zero_terminal_snr

from halfstep.models import EqM
from halfstep.models.objectives import Predicted, diffusion_loss, dispersive_loss, eqm_loss, gradient_magnitude
from tests.support import golden_cdit as cdit
from tests.support import golden_eqm as eqm


def test_the_eqm_loss_is_the_references() -> None:
    numbers, seen = eqm.NUMBERS, []
    model = eqm.golden_model()
    model.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        loss = eqm_loss(model, eqm.X, eqm.Y, x0=numbers["in.x0"], gamma=eqm.T)
    torch.testing.assert_close(loss, numbers["loss.per_sample"], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(seen[0], numbers["loss.x_gamma"], rtol=1e-5, atol=1e-6)
    share = eqm.T.reshape(-1, 1, 1, 1)
    torch.testing.assert_close(gradient_magnitude(share) * (eqm.X - numbers["in.x0"]), numbers["loss.target"])


def test_the_dispersive_loss_is_the_references() -> None:
    z = eqm.NUMBERS["none.last_activation"]
    torch.testing.assert_close(dispersive_loss(z).reshape(1), eqm.NUMBERS["loss.dispersive"], rtol=1e-4, atol=1e-5)
    squared = (z[:, None] - z[None]).flatten(2).square().sum(-1) / z[0].numel()
    torch.testing.assert_close(dispersive_loss(z), torch.log(torch.exp(-squared).mean()))


def test_dispersion_is_added_to_every_sample() -> None:
    model = eqm.golden_model()
    given: dict[str, Any] = {"x0": eqm.NUMBERS["in.x0"], "gamma": eqm.T}
    plain = eqm_loss(model, eqm.X, eqm.Y, **given)
    tokens = model.activations(eqm.NUMBERS["loss.x_gamma"], model.modulations(eqm.T, eqm.Y))
    with_dispersion = eqm_loss(model, eqm.X, eqm.Y, **given, dispersive_weight=0.5)
    torch.testing.assert_close(with_dispersion, plain + 0.5 * dispersive_loss(tokens))
    with_dispersion.mean().backward()
    assert model.x_embedder.proj.weight.grad is not None
    assert not model.blocks[-1]._forward_hooks


def test_a_new_network_starts_where_it_must() -> None:
    """A field of zero: E c^2 |x1 - x0|^2 = 13.8667 (1 + E x1^2) by integration over gamma."""
    torch.manual_seed(0)
    model = EqM(8, 2, 32, 1, 2, 3).eval()
    x1 = torch.randn(4000, 4, 8, 8) * 0.5
    with torch.no_grad():
        loss = eqm_loss(model, x1, torch.zeros(4000, dtype=torch.long)).mean()
    assert float(loss) == pytest.approx(13.8667 * 1.25, rel=0.02)


def test_the_diffusion_loss_is_the_references() -> None:
    numbers = cdit.NUMBERS
    model = cdit.golden_model()
    x, t, *condition = cdit.INPUTS
    seen = []
    model.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        loss = diffusion_loss(model, x, *condition, t=t, noise=numbers["in.noise"])
    torch.testing.assert_close(seen[0], numbers["diffusion.x_t"], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(loss, numbers["diffusion.loss"], rtol=1e-4, atol=1e-5)


def test_the_bound_trains_the_variance_alone() -> None:
    class Constant(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.noise = torch.nn.Parameter(torch.zeros(1))
            self.variance = torch.nn.Parameter(torch.zeros(1))

        def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            return torch.cat([self.noise.expand_as(x), self.variance.expand_as(x)], dim=1)

    x, noise = torch.randn(2, 8, 4, 4, 4).unbind(0)
    for t in (0, 1, 500, 999):
        network = Constant()
        diffusion_loss(network, x, t=torch.full((8,), t), noise=noise).mean().backward()
        assert network.variance.grad is not None
        assert network.noise.grad is not None
        assert float(network.noise.grad) == pytest.approx(-2 * float(noise.mean()), rel=1e-4)
        assert network.variance.grad.abs() > 0 or t == 0


def test_the_first_timestep_is_a_likelihood_of_pixels() -> None:
    """A network that knows the noise and says the smallest variance gives nearly no bits."""
    x = torch.linspace(-1.2, 1.2, 64).reshape(1, 4, 4, 4)
    noise = torch.randn(1, 4, 4, 4)

    class Knowing(torch.nn.Module):
        def forward(self, x_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            return torch.cat([noise, -torch.ones_like(noise)], dim=1)

    loss = diffusion_loss(Knowing(), x, t=torch.zeros(1, dtype=torch.long), noise=noise)
    assert math.isfinite(float(loss))
    assert 0 <= float(loss) < 2


class Guessing(torch.nn.Module):
    """Predicts as one who takes `guess` for the data."""

    def __init__(self, predicted: Predicted, guess: torch.Tensor) -> None:
        super().__init__()
        self.predicted, self.guess = predicted, guess
        self.seen: list[torch.Tensor] = []

    def forward(self, x_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        self.seen.append(x_t)
        bar = bars(self.predicted)[t].reshape(-1, 1, 1, 1)
        noise = (x_t - bar.sqrt() * self.guess) / (1 - bar).sqrt()
        velocity = bar.sqrt() * noise - (1 - bar).sqrt() * self.guess
        return torch.cat([noise if self.predicted == "noise" else velocity, torch.zeros_like(x_t)], dim=1)


def bars(predicted: Predicted) -> torch.Tensor:
    """abar by the library's own code."""
    betas = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    if predicted == "velocity":
        betas = rescale_zero_terminal_snr(betas)
    return torch.cumprod(1 - betas, dim=0).float()


@pytest.mark.parametrize("predicted", ["noise", "velocity"])
def test_what_is_predicted_counts_as_an_error_of_the_data(predicted: Predicted) -> None:
    """Without a weight by SNR for noise and 1 + SNR for velocity; with one by min(SNR, 5) for both."""
    x, noise, wrong = torch.randn(3, 6, 4, 4, 4).unbind(0)
    t = torch.tensor([0, 30, 200, 500, 800, 998])
    network = Guessing(predicted, x + 0.3 * wrong)
    plain, weighted = (
        diffusion_loss(network, x, t=t, noise=noise, predicted=predicted, min_snr=min_snr) for min_snr in (None, 5.0)
    )
    bar = bars(predicted)[t]
    snr = bar / (1 - bar)
    own = snr if predicted == "noise" else snr + 1
    error = (0.3 * wrong).square().flatten(1).mean(dim=1)
    torch.testing.assert_close(plain - weighted, (own - snr.clamp(max=5)) * error, rtol=1e-3, atol=2e-4)


def test_velocity_begins_in_pure_noise_and_knows_no_error_when_it_is_right() -> None:
    x, noise = torch.randn(2, 4, 4, 4, 4).unbind(0)
    network = Guessing("velocity", x)
    t = torch.tensor([999, 999, 500, 1])
    right = diffusion_loss(network, x, t=t, noise=noise, predicted="velocity")
    torch.testing.assert_close(network.seen[0][:2], noise[:2])
    wrong = diffusion_loss(Guessing("velocity", x + 1), x, t=t, noise=noise, predicted="velocity")
    assert torch.isfinite(right).all() and (wrong - right > 0.9).all()


def test_half_networks_are_measured_in_fp32() -> None:
    model = eqm.golden_model().bfloat16()

    class Half(torch.nn.Module):
        def forward(self, x: torch.Tensor, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            return model(x.bfloat16(), t, y)

    with torch.no_grad():
        loss = eqm_loss(Half(), eqm.X, eqm.Y, x0=eqm.NUMBERS["in.x0"], gamma=eqm.T)
    assert loss.dtype == torch.float32
    # bf16 rounds to 2^-8; the field is a sum of many such numbers beside an exact target.
    torch.testing.assert_close(loss, eqm.NUMBERS["loss.per_sample"], rtol=0.02, atol=0.02)
