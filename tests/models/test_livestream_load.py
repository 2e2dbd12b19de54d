"""The load: parameters and products of the network that was published, and right at batch 1."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from halfstep.errors import InputError
from halfstep.models import LiveStreamLoad
from halfstep.models.livestream_load import LOAD_WIDTHS, load_inputs
from halfstep.opening import open_model
from halfstep.precision import PrecisionPolicy, prepare


def small() -> tuple[LiveStreamLoad, tuple[torch.Tensor, ...]]:
    """With four frames."""
    generator = torch.Generator().manual_seed(1)
    frames = torch.randn(2, 4, 3, 32, 48, generator=generator)
    return LiveStreamLoad(16).eval(), (frames[0], torch.tensor([0.0, 10.0, 500.0, 999.0]), frames[1])


@pytest.mark.parametrize(
    ("width", "millions", "gmac"), [(96, 220.1, 19.8), (128, 391.3, 33.4), (192, 880.3, 71.3), (256, 1564.8, 123.2)]
)
def test_parameters_and_products_are_those_published(width: int, millions: float, gmac: float) -> None:
    with torch.device("meta"):
        network = LiveStreamLoad.named(f"livestream-load-{width}").eval()
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            assert network(*load_inputs()).shape == (1, 3, 64, 64)
    assert sum(p.numel() for p in network.parameters()) / 1e6 == pytest.approx(millions, abs=0.05)
    assert counter.get_total_flops() / 2e9 == pytest.approx(gmac, rel=0.02)


def test_the_first_unet_has_most_of_it() -> None:
    with torch.device("meta"):
        network = LiveStreamLoad(192)
    assert sum(p.numel() for p in network.first.parameters()) / 1e6 == pytest.approx(703, abs=0.5)


def test_a_sample_does_not_depend_on_its_batch() -> None:
    network, inputs = small()
    with torch.no_grad():
        together = network(*inputs)
        for number in range(4):
            alone = network(*(value[number : number + 1] for value in inputs))
            torch.testing.assert_close(alone[0], together[number], rtol=1e-3, atol=1e-4)


def test_every_input_counts_and_it_ends_as_published() -> None:
    network, (x, t, previous) = small()
    with torch.no_grad():
        plain = network(x, t, previous)
        for changed in ((x + 1, t, previous), (x, t + 200, previous), (x, t, previous + 1)):
            assert not torch.allclose(network(*changed), plain, atol=1e-4)
    assert plain.min() >= -0.2785  # of SiLU


@pytest.mark.parametrize("preset", ["bf16-true", "bf16-mixed"])
def test_half_is_near_fp32(preset: str) -> None:
    network, inputs = small()
    with torch.no_grad():
        exact = network(*inputs)
        half = prepare(network, PrecisionPolicy.parse(preset))(*inputs)
    # 2^-9 a rounding, two of them a convolution or norm, some 120 of those after one another in the longest way, as
    # independent errors: 2^-9 sqrt(240) = 0.03; norms make what they receive large again, errors too.
    assert (half - exact).norm() < 0.06 * exact.norm()


def test_names() -> None:
    opened = open_model("livestream-load-96", weights=False)
    assert opened.name == "livestream-load-96 (random weights)"
    assert opened.inputs is not None and len(opened.inputs) == 3
    assert {p.device.type for p in opened.module.parameters()} == {"meta"}
    assert LOAD_WIDTHS == (96, 128, 192, 256)
    with pytest.raises(InputError, match="got 'livestream-load-100'; expected one of livestream-load-96, "):
        open_model("livestream-load-100")


def test_mistakes_are_named() -> None:
    with pytest.raises(InputError, match="got a width of 5; expected an even number"):
        LiveStreamLoad(5)
    network, (x, t, previous) = small()
    with pytest.raises(InputError, match=r"got frames \[4, 3, 32, 47\]; expected \[N, 3, H, W\], H and W divisible by"):
        network(x[..., :47], t, previous)
