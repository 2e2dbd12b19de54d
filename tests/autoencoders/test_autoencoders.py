import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from halfstep.autoencoders import load_autoencoder, to_pixels
from halfstep.errors import InputError
from halfstep.precision import PRESETS, PrecisionPolicy


def pixels(batch: int = 2, height: int = 32, width: int = 48, seed: int = 0) -> torch.Tensor:
    return torch.rand(batch, 3, height, width, generator=torch.Generator().manual_seed(seed)) * 2 - 1


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**16), st.integers(1, 4), st.integers(1, 4))
def test_dct8_gives_back_what_it_keeps(seed: int, rows: int, columns: int) -> None:
    codec = load_autoencoder("dct8")
    latents = torch.randn(2, 16, rows, columns, generator=torch.Generator().manual_seed(seed))
    torch.testing.assert_close(codec.encode(codec.decode(latents)).mean, latents, rtol=0, atol=2e-5)


def test_pixels_are_their_own_latents() -> None:
    pictures = torch.randint(0, 256, (2, 5, 7, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    codec = load_autoencoder("pixels")
    latents = codec.scaled(codec.encode(to_pixels(pictures)).mean)
    assert latents.shape == (2, 3, 5, 7) and latents.abs().max() <= 1
    for stored in (latents, latents.half(), latents.bfloat16()):  # bf16 has 256 steps between 1/2 and 1
        error = np.abs(codec.pictures(stored.float()).astype(int) - pictures.numpy().astype(int)).max()
        assert error <= (1 if stored.dtype == torch.bfloat16 else 0)
    assert codec.reload().spec == codec.spec


def test_dct8_is_an_orthogonal_projection() -> None:
    """What it drops is orthogonal to what it keeps, so energies add up (Parseval)."""
    codec = load_autoencoder("dct8")
    given_pixels = pixels().double().float()
    latents = codec.encode(given_pixels).mean
    dropped = given_pixels - codec.decode(latents)
    torch.testing.assert_close(
        latents.square().sum() + dropped.square().sum(), given_pixels.square().sum(), rtol=1e-5, atol=0
    )


def test_dct8_matches_scipy_free_definition() -> None:
    """A gray ramp: the intensity's first horizontal coefficient by the definition of the DCT-II."""
    codec = load_autoencoder("dct8")
    ramp = torch.linspace(-1, 1, 8)
    block = ramp.expand(1, 3, 8, 8).contiguous()
    cosine = torch.cos(torch.pi * (2 * torch.arange(8) + 1) / 16)
    expected = 3**0.5 * 8**0.5 * 0.5 * (ramp * cosine).sum()
    latents = codec.encode(block).mean[0, :, 0, 0]
    torch.testing.assert_close(latents[1], expected)
    assert latents[10:].abs().max() < 1e-5  # no color


def test_taef2_equals_the_reference(outside_data: Path) -> None:
    golden = load_file(outside_data / "golden" / "taef2_astronaut.safetensors")
    codec = load_autoencoder(str(outside_data / "autoencoders"))
    given_pixels = golden["pixels_u8"].permute(2, 0, 1)[None].float() / 127.5 - 1
    latents = codec.encode(given_pixels).mean
    torch.testing.assert_close(latents, golden["latents"], rtol=1e-4, atol=1e-4)
    error = (codec.decode(latents).clamp(-1, 1) - given_pixels).abs().mean() / 2
    torch.testing.assert_close(error, golden["decoded_mean_abs_error"][0], rtol=1e-3, atol=0)


def test_taef2_names_damaged_weights(tmp_path: Path) -> None:
    (tmp_path / "taef2_encoder.pth").write_bytes(b"not a checkpoint")
    with pytest.raises(InputError, match=r"taef2_encoder.pth: not the weights of taef2"):
        load_autoencoder(str(tmp_path))


def test_diffusers_autoencoder_is_the_librarys(small_vae: Path) -> None:
    from diffusers import AutoencoderKL

    ours, theirs = load_autoencoder(str(small_vae)), AutoencoderKL.from_pretrained(small_vae)
    posterior = ours.encode(pixels())
    with torch.no_grad():
        expected = theirs.encode(pixels()).latent_dist
        torch.testing.assert_close(posterior.mean, expected.mean)
        torch.testing.assert_close(posterior.logvar, expected.logvar)
        torch.testing.assert_close(ours.decode(posterior.mean), theirs.decode(expected.mean).sample)
    assert (ours.spec.channels, ours.spec.spatial_factor, ours.spec.scale) == (4, 2, (0.18215,))


def test_a_whole_pipelines_folder_is_searched(small_vae: Path, tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text('{"_class_name": "StableDiffusionPipeline"}')
    (tmp_path / "vae").symlink_to(small_vae)
    assert load_autoencoder(str(tmp_path)).spec.weights_sha256 == load_autoencoder(str(small_vae)).spec.weights_sha256


def test_wan_has_a_mean_and_deviation_a_channel(small_wan: Path) -> None:
    codec = load_autoencoder(str(small_wan))
    clip = pixels(1, 16, 16)[:, :, None].expand(-1, -1, 5, -1, -1)
    posterior = codec.encode(clip)
    assert posterior.mean.shape == (1, 16, 2, 2, 2)
    assert codec.decode(posterior.mean).shape == clip.shape
    assert len(codec.spec.scale) == len(codec.spec.shift) == 16
    torch.testing.assert_close(codec.unscaled(codec.scaled(posterior.mean)), posterior.mean)
    with pytest.raises(InputError, match=r"expected \[B, C, T, H, W\]"):
        codec.encode(pixels())


MEANS: dict[str, Any] = {"latents_mean": [-1.6, 2.1, 3.0, -0.7], "latents_std": [8.0, 4.0, 5.0, 6.0]}


def with_config(vae: Path, folder: Path, **changes: Any) -> str:
    shutil.copytree(vae, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))
    return str(folder)


def test_a_mean_and_deviation_a_channel_are_applied_as_the_pipelines_do(small_vae: Path, tmp_path: Path) -> None:
    codec = load_autoencoder(with_config(small_vae, tmp_path / "vae", **MEANS))
    raw = codec.encode(pixels()).mean
    mean, std = (torch.tensor(MEANS[name]).view(1, 4, 1, 1) for name in ("latents_mean", "latents_std"))
    torch.testing.assert_close(codec.scaled(raw), (raw - mean) * 0.18215 / std)
    torch.testing.assert_close(codec.unscaled(codec.scaled(raw)), raw)
    plain = load_autoencoder(str(small_vae))
    assert torch.equal(plain.encode(pixels()).mean, raw)
    assert (plain.spec.scale, plain.spec.shift) == ((0.18215,), (0.0,))


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        (
            {"latents_mean": [0.0] * 4},
            "its config has scaling_factor, latents_mean; expected latents_mean and latents_std",
        ),
        (
            {"latents_std": [1.0] * 4},
            "its config has scaling_factor, latents_std; expected latents_mean and latents_std",
        ),
        ({**MEANS, "shift_factor": 0.1}, "together, and no shift_factor beside them"),
        (
            {"latents_mean": [0.0] * 3, "latents_std": [1.0] * 4},
            "has 3 of latents_mean and 4 of latents_std; expected 4",
        ),
        ({"latents_mean": [0.0] * 4, "latents_std": [1.0, 1.0, 1.0, 0.0]}, "and no deviation of 0"),
    ],
)
def test_scales_that_are_not_understood_are_refused(
    small_vae: Path, tmp_path: Path, changes: dict[str, Any], named: str
) -> None:
    with pytest.raises(InputError, match=named):
        load_autoencoder(with_config(small_vae, tmp_path / "vae", **changes))


def test_scales_that_a_class_does_not_apply_are_refused(small_wan: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="its config has a scaling_factor, which AutoencoderKLWan does not apply"):
        load_autoencoder(with_config(small_wan, tmp_path / "scaled", scaling_factor=0.5))
    neutral = load_autoencoder(with_config(small_wan, tmp_path / "neutral", scaling_factor=1.0, shift_factor=None))
    assert neutral.spec.scale == load_autoencoder(str(small_wan)).spec.scale


def test_tiny_diffusers_autoencoder(tmp_path: Path) -> None:
    from diffusers import AutoencoderTiny

    widths = {"encoder_block_out_channels": (16, 16), "decoder_block_out_channels": (16, 16)}
    model = AutoencoderTiny(**widths, num_encoder_blocks=(1, 1), num_decoder_blocks=(1, 1))
    model.save_pretrained(tmp_path)
    codec = load_autoencoder(str(tmp_path))
    posterior = codec.encode(pixels())
    assert posterior.logvar is None
    with torch.no_grad():
        torch.testing.assert_close(posterior.mean, model.eval().encode(pixels()).latents)


def test_large_pictures_in_tiles(small_vae: Path) -> None:
    """The library's tiles overlap and are blended, so the middle of the picture agrees with the whole."""
    whole, tiled = (load_autoencoder(str(small_vae), tiled=t) for t in (False, True))
    size = 2 * tiled.encoder.vae.tile_sample_min_size
    large = torch.nn.functional.interpolate(pixels(1, 16, 16), size=(size, size), mode="bilinear")
    exact, pieces = whole.encode(large).mean, tiled.encode(large).mean
    assert exact.shape == pieces.shape
    assert not torch.equal(exact, pieces)
    assert ((exact - pieces).norm() / exact.norm()) < 0.2


@pytest.mark.parametrize("name", ["dct8", "small_vae", "small_wan"])
@pytest.mark.parametrize("preset", ["bf16-true", "bf16-mixed", "16-true"])
def test_half_against_fp32(name: str, preset: str, request: pytest.FixtureRequest) -> None:
    identifier = name if name == "dct8" else str(request.getfixturevalue(name))
    shape = pixels(2, 16, 16) if name != "small_wan" else pixels(2, 16, 16)[:, :, None].expand(-1, -1, 5, -1, -1)
    exact = load_autoencoder(identifier).encode(shape).mean
    half = load_autoencoder(identifier).prepared("cpu", PrecisionPolicy.parse(preset)).encode(shape).mean
    # A few dozen roundings in a row, each half an ulp and independent: their root of the sum of squares, with room.
    eps = torch.finfo(torch.bfloat16 if "bf16" in preset else torch.float16).eps
    assert (half - exact).norm() / exact.norm() < 6 * eps


@pytest.mark.parametrize("preset", [name for name in PRESETS if name not in ("auto", "16-mixed", "16-true")])
@pytest.mark.parametrize("name", ["dct8", "small_vae"])
def test_a_samples_latents_do_not_depend_on_its_batch(name: str, preset: str, request: pytest.FixtureRequest) -> None:
    identifier = name if name == "dct8" else str(request.getfixturevalue(name))
    codec = load_autoencoder(identifier).prepared("cpu", PrecisionPolicy.parse(preset))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        batch = pixels(4)
        together = codec.encode(batch).mean
        alone = torch.zeros_like(batch)
        alone[2] = batch[0]
        assert torch.equal(codec.encode(alone).mean[2], together[0])
        assert torch.equal(codec.encode(batch.flip(0)).mean.flip(0), together)
    finally:
        torch.set_num_threads(threads)


def test_the_digest_is_of_the_weights_not_of_the_file(small_vae: Path, tmp_path: Path) -> None:
    from diffusers import AutoencoderKL

    model = AutoencoderKL.from_pretrained(small_vae)
    model.save_pretrained(tmp_path / "same", safe_serialization=False)
    same = load_autoencoder(str(tmp_path / "same")).spec
    assert same.weights_sha256 == load_autoencoder(str(small_vae)).spec.weights_sha256
    with torch.no_grad():
        model.encoder.conv_in.bias[0] += 1e-6
    model.save_pretrained(tmp_path / "other")
    assert load_autoencoder(str(tmp_path / "other")).spec.weights_sha256 != same.weights_sha256


@pytest.mark.parametrize(
    ("identifier", "named"),
    [
        ("some-lab/some-vae", "some-lab/some-vae: no network; available here: dct8"),
        ("not an id!", "not an id!: not a folder, and not on the hub"),
        ("taef2", "give the folder that holds taef2_encoder.pth"),
    ],
)
def test_what_cannot_be_found_is_told_with_alternatives(identifier: str, named: str, monkeypatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(InputError) as error:
        load_autoencoder(identifier)
    assert str(error.value).startswith(named) or named in str(error.value)


def test_a_folder_of_something_else(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no autoencoder here"):
        load_autoencoder(str(tmp_path))
    (tmp_path / "config.json").write_text('{"_class_name": "UNet2DModel"}')
    with pytest.raises(InputError, match="is a UNet2DModel; expected one of AutoencoderKL"):
        load_autoencoder(str(tmp_path))


def test_shapes_that_do_not_fit_are_named() -> None:
    with pytest.raises(InputError, match=r"got pixels of shape \[1, 3, 12, 16\].*H, W divisible by 8"):
        load_autoencoder().encode(torch.zeros(1, 3, 12, 16))
    assert np.isfinite(load_autoencoder().spec.scale).all()
