"""livestream: its preconditioning against a plain oracle, one sample at a time, in half, and that it learns."""

import math
from typing import Any

import pytest
import torch
from torch import nn

from halfstep.errors import InputError
from halfstep.models import FAMILIES, About, LiveStream
from halfstep.models.livestream import denoised
from halfstep.models.objectives import Preconditioning, edm_denoised, edm_loss
from halfstep.precision import PrecisionPolicy, prepare

SMALL: dict[str, Any] = {"hidden_size": 16, "depth": 3, "num_heads": 4}


def filled(network: LiveStream) -> LiveStream:
    """With weights where a new one has zeros."""
    generator = torch.Generator().manual_seed(3)
    for parameter in network.parameters():
        if parameter.dim() > 1 and not parameter.any():
            fan_in = parameter[0].numel()
            nn.init.normal_(parameter, std=fan_in**-0.5, generator=generator)
    return network


def small() -> tuple[LiveStream, tuple[torch.Tensor, ...]]:
    """With the arguments for four samples."""
    torch.manual_seed(0)
    network = filled(LiveStream((7, 10), 2, **SMALL, in_channels=4)).eval()
    x, context = torch.randn(4, 4, 7, 10), torch.randn(4, 2, 4, 7, 10)
    return network, (x, torch.linspace(-1.5, 0.4, 4), torch.randn(4, 3), context, torch.linspace(0, 0.7, 4))


@pytest.mark.parametrize(("size", "millions"), [("S", 1.61), ("M", 6.40), ("L", 24.56)])
def test_sizes_and_their_names(size: str, millions: float) -> None:
    with torch.device("meta"):
        network = LiveStream.named(f"livestream-{size}", 64, 4)
    assert sum(p.numel() for p in network.parameters()) / 1e6 == pytest.approx(millions, abs=0.01)
    assert About("livestream", network.config).name == f"livestream-{size}"
    assert About("livestream", {**network.config, "depth": 2}).name.startswith("livestream of depth 2, width ")


def test_a_new_network_returns_zero_and_any_size_goes() -> None:
    for size in (1, 5, (6, 8), (28, 28)):
        network = LiveStream(size, 3, **SMALL).eval()
        x = torch.randn(2, *network.latent_shape)
        told = torch.zeros(2), torch.zeros(2, 3), torch.randn(2, 3, *network.latent_shape), torch.zeros(2)
        assert network(x, *told).abs().max() == 0
        assert filled(network)(x, *told).shape == x.shape


def test_every_input_counts() -> None:
    network, inputs = small()
    with torch.no_grad():
        plain = network(*inputs)
        for i in range(5):
            changed = [value + 0.1 if i == k else value for k, value in enumerate(inputs)]
            assert not torch.allclose(network(*changed), plain, atol=1e-4), i


def test_a_sample_does_not_depend_on_its_batch() -> None:
    network, inputs = small()
    with torch.no_grad():
        together = network(*inputs)
        for number in range(4):
            alone = network(*(value[number : number + 1] for value in inputs))
            torch.testing.assert_close(alone[0], together[number], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("preset", ["bf16-mixed", "bf16-true", "16-true"])
def test_half_is_near_fp32(preset: str) -> None:
    network, inputs = small()
    with torch.no_grad():
        exact = network(*inputs)
        prepare(network, PrecisionPolicy.parse(preset))
        half = network(*inputs)
    kept = {name.partition(".")[0] for name, value in network.state_dict().items() if value.dtype == torch.float32}
    assert preset == "bf16-mixed" or kept == {"condition"}
    # Some 40 roundings on the longest way, 2^-9 each in bf16, 2^-12 in fp16, as independent errors.
    assert (half - exact).norm() < (0.02 if preset.startswith("bf16") else 0.0025) * exact.norm()


def test_recomputed_blocks_give_the_same_gradients() -> None:
    network, inputs = small()
    gradients = []
    for recomputed in (0, 3, 7):
        network.recomputed_blocks = recomputed
        network.zero_grad()
        network(*inputs).square().sum().backward()
        gradients.append([p.grad.clone() for p in network.parameters() if p.grad is not None])
    for other in gradients[1:]:
        assert all(torch.equal(a, b) for a, b in zip(gradients[0], other, strict=True))


# --- Preconditioning --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sigma_data", [0.5, 1.5])
def test_scalings_are_those_of_table_1(sigma_data: float) -> None:
    for sigma in (2e-3, 0.1, 0.5, 5.0):
        at = Preconditioning(torch.tensor([sigma]), sigma_data)
        assert float(at.skip) == pytest.approx(sigma_data**2 / (sigma**2 + sigma_data**2))
        assert float(at.out) == pytest.approx(sigma * sigma_data / math.sqrt(sigma_data**2 + sigma**2))
        assert float(at.into) == pytest.approx(1 / math.sqrt(sigma**2 + sigma_data**2))
        assert float(at.noise) == pytest.approx(math.log(sigma) / 4)


@pytest.mark.parametrize("sigma", [2e-3, 0.05, 0.5, 5.0])
def test_input_and_target_have_variance_1(sigma: float) -> None:
    """For data of deviation sigma_data. The target is seen through the loss of a network that returns zero."""
    y = 0.5 * torch.randn(64, 3, 32, 32)
    seen = []

    def zero(x: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        seen.append(x)
        return torch.zeros_like(x)

    losses = edm_loss(zero, y, sigma=torch.full((64,), sigma))
    assert float(seen[0].var()) == pytest.approx(1, rel=0.01)
    assert float(losses.mean()) == pytest.approx(1, rel=0.01)


def test_the_loss_is_the_weighted_error_of_what_is_denoised() -> None:
    """By the formulas of the paper, in fp64."""
    torch.manual_seed(1)
    y, noise = 0.5 * torch.randn(5, 2, 4, 4), torch.randn(5, 2, 4, 4)
    sigma = torch.tensor([0.01, 0.1, 0.5, 2.0, 5.0])
    weights = torch.randn(2, 2)

    def model(x: torch.Tensor, noise: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
        return torch.einsum("oc,nchw->nohw", weights.to(x.dtype), x) + noise.to(x.dtype)[:, None, None, None] * shift

    shift = torch.tensor(0.3)
    found = edm_loss(model, y, shift, sigma=sigma, noise=noise)
    s, data = sigma.double().reshape(-1, 1, 1, 1), 0.5
    x = y.double() + s * noise.double()
    c_in, c_noise = 1 / (s**2 + data**2).sqrt(), (sigma.double().log() / 4)
    c_skip, c_out = data**2 / (s**2 + data**2), s * data * c_in
    denoiser = c_skip * x + c_out * model(c_in * x, c_noise, shift.double())
    weight = (s**2 + data**2) / (s * data) ** 2
    expected = (weight * (denoiser - y.double()) ** 2).flatten(1).mean(dim=1)
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=0)
    ours = edm_denoised(model, x.float(), sigma, data, shift)
    torch.testing.assert_close(ours.double(), denoiser, rtol=1e-5, atol=1e-5)


def test_noise_levels_of_training_are_log_normal() -> None:
    seen: list[torch.Tensor] = []
    for sigma_data in (0.5, 2.0):
        edm_loss(lambda x, noise: seen.append(4 * noise) or x, torch.zeros(20000, 1, 1, 1), sigma_data=sigma_data)  # type: ignore[func-returns-value]
    for logs, mean in zip(seen, (-0.4, -0.4 + math.log(4)), strict=True):
        assert float(logs.mean()) == pytest.approx(mean, abs=0.04)
        assert float(logs.std()) == pytest.approx(1.2, abs=0.04)


def test_preconditioning_is_fp32_whatever_the_network_computes_in() -> None:
    """At small noise the frame comes back with all its digits; once bf16 on the way it has an error of 2^-9."""
    network, (x, _, actions, context, _) = small()
    prepare(network, PrecisionPolicy.parse("bf16-true"))
    with torch.no_grad():
        frame = denoised(network, x, torch.full((4,), 1e-6), actions, context, network.sigma_data)
    assert frame.dtype == torch.float32
    torch.testing.assert_close(frame, x, rtol=1e-5, atol=1e-5)


# --- Learning ---------------------------------------------------------------------------------------------------------


def shifted(count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Walks of smooth pictures that an action moves one pixel to the left or to the right: frames [N, 3, 1, 8, 8], of
    which the last is the goal, actions [N, 1, 3], rel_t [N, 1]."""
    generator = torch.Generator().manual_seed(seed)
    spectrum = torch.zeros(count, 1, 8, 5, dtype=torch.complex64)
    spectrum[:, :, :3, :3] = torch.randn(count, 1, 3, 3, generator=generator, dtype=torch.complex64)
    picture = torch.fft.irfft2(spectrum, s=(8, 8))
    picture = 0.5 * picture / picture.flatten(1).std(dim=1).reshape(-1, 1, 1, 1)
    left = torch.randint(2, (count,), generator=generator) * 2 - 1
    moved = torch.stack([one.roll(int(side), -1) for one, side in zip(picture, left, strict=True)])
    actions = torch.stack([torch.zeros(count), 0.5 * left, torch.zeros(count)], dim=1)
    return torch.stack([picture, picture, moved], dim=1), actions[:, None], torch.full((count, 1), 1 / 128)


@pytest.mark.slow
def test_it_learns_what_an_action_does() -> None:
    torch.manual_seed(0)
    network = LiveStream(8, 2, hidden_size=16, depth=2, num_heads=4, in_channels=1)
    objective = FAMILIES["livestream"].objective({"context_size": 2, "sigma_data": 0.5, "history_noise": 0.7})
    optimizer = torch.optim.AdamW(network.parameters(), lr=5e-3)
    losses = []
    for step in range(200):
        loss = objective(network, shifted(32, step)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert sum(losses[-50:]) < 0.4 * sum(losses[:50])
    frames, actions, _ = shifted(256, 10**6)
    context, goal = frames[:, :2], frames[:, 2]
    noise, sigma = torch.randn(goal.shape), torch.full((256,), 5.0)
    with torch.no_grad():
        predicted = denoised(network.eval(), 5 * noise, sigma, actions[:, 0], context, 0.5)
        other = denoised(network, 5 * noise, sigma, -actions[:, 0], context, 0.5)
    error, copied = (predicted - goal).square().mean(), (context[:, -1] - goal).square().mean()
    assert error < 0.1 * copied  # 10 dB
    assert (other - goal).square().mean() > copied


def test_mistakes_are_named() -> None:
    network, inputs = small()
    with pytest.raises(InputError, match=r"and context \[1, 4, 7, 10\]; expected \[4, 7, 10\] and \[2, 4, 7, 10\]"):
        network(*inputs[:3], inputs[3][:, :1], inputs[4])
    with pytest.raises(InputError, match="got 5 heads; expected a divisor of the last level's 64"):
        LiveStream(8, 2, hidden_size=16, depth=3, num_heads=5)
    with pytest.raises(InputError, match=r"got 'livestream-S/2'; expected livestream-\{S,M,L\}$"):
        LiveStream.named("livestream-S/2", 8, 2)
