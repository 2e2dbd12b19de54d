"""PeakNet against numbers of its reference, and its form for inference against itself."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from halfstep.errors import InputError
from halfstep.models import PeakNet
from halfstep.models.peaknet import response

GOLDEN = Path(__file__).parents[1] / "golden"
NAMES = ("peaknet_tiny", "peaknet_learned_tiny")
SMALL = {
    "backbone_hidden_sizes": [8, 12, 16, 24],
    "backbone_depths": [1, 2, 1, 1],
    "bifpn_num_blocks": 3,
    "bifpn_num_features": 16,
    "seg_out_channels": 64,
}


def golden(name: str) -> tuple[dict[str, torch.Tensor], dict[str, object]]:
    path = GOLDEN / f"{name}.safetensors"
    with safe_open(path, "pt") as file:
        return load_file(path), json.loads(file.metadata()["config"])


def weights_of(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name.removeprefix("weights."): value for name, value in tensors.items() if name.startswith("weights.")}


def random_network(learned: bool, seed: int = 0) -> PeakNet:
    """With every weight other than what it begins as."""
    torch.manual_seed(seed)
    network = PeakNet(uses_learned_upsample=learned, **SMALL).eval()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return network


def margin(logits: torch.Tensor) -> torch.Tensor:
    return logits[:, 1:] - logits[:, :1]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", ["", "_wide"])
@torch.inference_mode()
def test_the_reference_and_its_fused_form(name: str, shape: str, tmp_path: Path) -> None:
    tensors, config = golden(name)
    torch.save(weights_of(tensors), tmp_path / "w.pt")
    network = PeakNet.load(tmp_path / "w.pt", **config)
    logits = network(tensors[f"in.x{shape}"])
    assert (logits - tensors[f"out.logits{shape}"]).abs().max() <= 1e-5
    fused = network.fused()(tensors[f"in.x{shape}"])
    assert fused.shape == (len(logits), 1, *logits.shape[2:])
    assert (fused - margin(logits)).abs().max() <= 2e-5


@pytest.mark.parametrize("learned", [False, True])
@torch.inference_mode()
def test_the_fused_form_of_any_weights(learned: bool) -> None:
    """Three blocks, two layers in a stage, frames that are not square; weights of the sums of either sign."""
    network = random_network(learned)
    with torch.no_grad():
        for block in network.bifpn.blocks:
            block.w_m.copy_(torch.randn(3, 2))
            block.w_q.copy_(torch.randn(3, 3))  # also where the mask leaves it out
    x = torch.randn(3, 1, 64, 96)
    exact = margin(network.double()(x.double())).float()
    network.float()
    largest = exact.abs().max()
    assert (margin(network(x)) - exact).abs().max() < 1e-4 * largest
    assert (network.fused()(x) - exact).abs().max() < 1e-4 * largest
    before = {name: value.clone() for name, value in network.state_dict().items()}
    fused = network.fused().half()
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert {parameter.dtype for parameter in fused.parameters()} == {torch.float16}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.inference_mode()
def test_half_stays_near_fp32(dtype: torch.dtype) -> None:
    tensors, config = golden("peaknet_tiny")
    network = PeakNet(**config).eval()  # type: ignore[arg-type]
    network.load_state_dict(weights_of(tensors), strict=True)
    exact = margin(tensors["out.logits"])
    fused = network.fused().to(dtype)(tensors["in.x"].to(dtype))
    plain = margin(network.to(dtype)(tensors["in.x"].to(dtype)))
    rounding = torch.finfo(dtype).eps
    for found in (plain, fused):
        assert found.dtype == dtype
        assert (found.float() - exact).norm() / exact.norm() < 4 * rounding
        assert ((found > 0) == (exact > 0)).float().mean() > 0.99


def test_a_channel_that_is_zero_over_a_frame_has_a_gradient() -> None:
    x = torch.randn(2, 4, 4, 3, generator=torch.Generator().manual_seed(0))
    x[0, :, :, 1] = 0
    x.requires_grad_()
    (x * response(x)).sum().backward()
    assert x.grad is not None
    assert x.grad.isfinite().all()
    assert response(x)[0, :, :, 1].max() < 1e-18


def test_a_response_is_summed_in_fp32() -> None:
    """A frame's squares are beyond fp16, and more than bf16 can add up."""
    x = torch.full((1, 128, 128, 4), 8.0)
    x[..., 1:] = 2.0
    expected = response(x)
    assert response(x.half()).float() == pytest.approx(expected, rel=2e-3)
    assert response(x.bfloat16()).float() == pytest.approx(expected, rel=1e-2)


def test_its_published_sizes() -> None:
    with torch.device("meta"):
        assert sum(parameter.numel() for parameter in PeakNet().parameters()) == 33_164_768
        assert len(PeakNet().state_dict()) == 296
        large = PeakNet(
            backbone_hidden_sizes=[352, 704, 1408, 2816],
            backbone_depths=[3, 3, 27, 3],
            bifpn_num_blocks=4,
            bifpn_num_features=512,
            uses_learned_upsample=True,
        )
    assert sum(parameter.numel() for parameter in large.parameters()) == 673_012_480
    assert len(large.state_dict()) == 532


def test_weights_that_do_not_fit_are_named(tmp_path: Path) -> None:
    path = tmp_path / "w.pt"
    state = random_network(learned=True).state_dict()
    with pytest.raises(InputError, match=r"w\.pt: no such file; expected the weights of a PeakNet"):
        PeakNet.load(path)
    path.write_bytes(b"no weights")
    with pytest.raises(InputError, match=r"w\.pt: cannot be read"):
        PeakNet.load(path)
    torch.save({"a.weight": torch.zeros(3)}, path)
    with pytest.raises(
        InputError, match=r"no weights of a PeakNet, 'backbone\.hidden_states_norms\.stage1\.weight' is"
    ):
        PeakNet.load(path)
    torch.save({name: value for name, value in state.items() if "conv.q6.1" not in name}, path)
    with pytest.raises(
        InputError, match=r"does not fit the PeakNet asked for: missing are bifpn\.blocks\.0\.conv\.q6\.1"
    ):
        PeakNet.load(path)
    torch.save({**state, "head_segmask.bias": torch.zeros(5)}, path)
    with pytest.raises(InputError, match=r"head_segmask\.bias is \[5\], expected \[2\]"):
        PeakNet.load(path)
    torch.save(state, path)
    assert PeakNet.load(path).state_dict().keys() == state.keys()
    with pytest.raises(InputError, match=r"has bifpn_num_blocks 3, the configuration says 2"):
        PeakNet.load(path, bifpn_num_blocks=2)


def test_sizes_that_do_not_fit_are_named() -> None:
    with pytest.raises(InputError, match="expected four of each"):
        PeakNet(backbone_depths=[1, 1, 1])
    with pytest.raises(InputError, match="expected a multiple of 32"):
        PeakNet(seg_out_channels=48)
    network = random_network(learned=False)
    for model in (network, network.fused()):
        with pytest.raises(
            InputError, match=r"got frames \[1, 1, 48, 64\]; expected \[B, C, H, W\], H and W divisible"
        ):
            model(torch.zeros(1, 1, 48, 64))
    with pytest.raises(InputError, match="got 3 classes; a margin is between two"):
        PeakNet(num_classes=3, **SMALL).fused()
