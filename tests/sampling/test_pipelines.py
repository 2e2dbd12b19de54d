"""Pipelines of diffusers that people use, from small configurations with random weights: the same sample bit for bit,
recorded or not, and each state as the pipeline had it."""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
import zarr

from halfstep.sampling import record
from halfstep.store import TrajectoryFormat, TrajectoryStore

EXACT = TrajectoryFormat(storage="fp32")
Made = tuple[Any, dict[str, Any]]


def text(**more: torch.Tensor) -> dict[str, torch.Tensor]:
    """What the text encoders would have made of a prompt."""
    embeddings = torch.randn(1, 6, 32)
    return {"prompt_embeds": embeddings, "negative_prompt_embeds": embeddings / 2, **more}


def flux() -> Made:
    transformer = diffusers.FluxTransformer2DModel(
        patch_size=1, in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=32, pooled_projection_dim=32, axes_dims_rope=(4, 4, 8),
    )  # fmt: skip
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    pipe = diffusers.FluxPipeline(scheduler, None, None, None, None, None, transformer)
    prompt = {"prompt_embeds": torch.randn(1, 6, 32), "pooled_prompt_embeds": torch.randn(1, 32)}
    return pipe, {**prompt, "height": 64, "width": 64, "guidance_scale": 3.5}


def ltx() -> Made:
    transformer = diffusers.LTXVideoTransformer3DModel(
        in_channels=8, out_channels=8, num_attention_heads=4, attention_head_dim=8, cross_attention_dim=32,
        num_layers=1, caption_channels=32,
    )  # fmt: skip
    pipe = diffusers.LTXPipeline(diffusers.FlowMatchEulerDiscreteScheduler(), None, None, None, transformer)
    masks = dict.fromkeys(
        ("prompt_attention_mask", "negative_prompt_attention_mask"), torch.ones(1, 6, dtype=torch.bool)
    )
    return pipe, {**text(**masks), "height": 64, "width": 64, "num_frames": 9, "guidance_scale": 3.0}


def cogvideox(scheduler: str) -> Made:
    transformer = diffusers.CogVideoXTransformer3DModel(
        num_attention_heads=4, attention_head_dim=8, in_channels=4, out_channels=4, time_embed_dim=2, text_embed_dim=32,
        num_layers=1, sample_width=2, sample_height=2, sample_frames=9, max_text_seq_length=6,
    )  # fmt: skip
    vae = diffusers.AutoencoderKLCogVideoX(
        down_block_types=("CogVideoXDownBlock3D",) * 4, up_block_types=("CogVideoXUpBlock3D",) * 4,
        block_out_channels=(8,) * 4, latent_channels=4, layers_per_block=1, norm_num_groups=2,
    )  # fmt: skip
    made = getattr(diffusers, scheduler)(rescale_betas_zero_snr=True, prediction_type="v_prediction")
    pipe = diffusers.CogVideoXPipeline(None, None, vae, transformer, made)
    return pipe, {**text(), "height": 16, "width": 16, "num_frames": 9, "guidance_scale": 6.0}


def of_wan(kind: str, transformer: str, **more: Any) -> Made:
    network = getattr(diffusers, transformer)(
        num_attention_heads=2, attention_head_dim=12, in_channels=16, out_channels=16, text_dim=32, freq_dim=256,
        ffn_dim=32, num_layers=2, rope_max_seq_len=32, **more,
    )  # fmt: skip
    vae = diffusers.AutoencoderKLWan(base_dim=3, dim_mult=[1, 1, 1, 1], num_res_blocks=1)
    scheduler = diffusers.UniPCMultistepScheduler(
        flow_shift=8.0, use_flow_sigmas=True, prediction_type="flow_prediction"
    )
    cls = getattr(diffusers, kind)
    pipe = cls(tokenizer=None, text_encoder=None, transformer=network, vae=vae, scheduler=scheduler)
    return pipe, {"prompt": None, **text(), "height": 16, "width": 16, "num_frames": 9, "guidance_scale": 5.0}


def stable_diffusion() -> Made:
    unet = diffusers.UNet2DConditionModel(
        sample_size=8, block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=4, cross_attention_dim=32,
        attention_head_dim=4, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )  # fmt: skip
    vae = diffusers.AutoencoderKL(block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2,
                                  up_block_types=("UpDecoderBlock2D",) * 2, norm_num_groups=4)  # fmt: skip
    pipe = diffusers.StableDiffusionPipeline(
        vae, None, None, unet, diffusers.PNDMScheduler(skip_prk_steps=True, steps_offset=1), None, None,
        requires_safety_checker=False,
    )  # fmt: skip
    return pipe, {**text(), "height": 16, "width": 16, "guidance_scale": 7.5}


# By name: how it is made, the names of a step's axes, and which of them has the channels.
VIDEO, PICTURE, PACKED = ("frame", "height", "width"), ("height", "width"), ("token", "channel")
PIPELINES: dict[str, tuple[Callable[[], Made], tuple[str, ...]]] = {
    "Flux": (flux, PACKED),
    "LTX": (ltx, PACKED),
    "CogVideoX, DDIM": (lambda: cogvideox("CogVideoXDDIMScheduler"), ("frame", "channel", *PICTURE)),
    "CogVideoX, DPM": (lambda: cogvideox("CogVideoXDPMScheduler"), ("frame", "channel", *PICTURE)),
    "SkyReels-V2": (lambda: of_wan("SkyReelsV2Pipeline", "SkyReelsV2Transformer3DModel"), ("channel", *VIDEO)),
    "Wan": (lambda: of_wan("WanPipeline", "WanTransformer3DModel"), ("channel", *VIDEO)),
    "Stable Diffusion": (stable_diffusion, ("channel", *PICTURE)),
}


@dataclass
class Caller:
    """Calls a pipeline for four steps from seed 7."""

    pipe: Any
    options: dict[str, Any]

    def __call__(self, **more: Any) -> torch.Tensor:
        self.pipe.set_progress_bar_config(disable=True)
        seeded = torch.Generator().manual_seed(7)
        fixed: dict[str, Any] = {"num_inference_steps": 4, "output_type": "latent", "generator": seeded}
        result: torch.Tensor = self.pipe(**self.options, **fixed, **more)[0]
        return result


def make(name: str) -> tuple[Any, Caller]:
    torch.manual_seed(0)
    pipe, options = PIPELINES[name][0]()
    return pipe, Caller(pipe, options)


@pytest.mark.parametrize("name", PIPELINES)
def test_the_same_sample_bit_for_bit(name: str, tmp_path: Path) -> None:
    pipe, call = make(name)
    plain = call()
    seen: list[torch.Tensor] = []
    with record(pipe, tmp_path / "s", run="a", format=EXACT) as recording:

        def callback(*args: Any) -> dict[str, Any]:
            seen.append(args[3]["latents"][0].clone())
            return recording(*args)

        recorded = call(callback_on_step_end=callback)
    assert torch.equal(plain, recorded)
    assert torch.equal(plain, call())
    assert recording.refused is None
    run = TrajectoryStore.open(tmp_path / "s")["a"]
    assert run.problems == ()
    assert len(run) == len(seen) + 1
    for state, latent in zip(list(run.latents)[1:], seen, strict=True):
        assert np.array_equal(state, latent.numpy())
    assert (np.diff(run.sigmas) <= 0).all()
    assert np.isfinite(run.sigmas).all()
    array = zarr.open_array(str(tmp_path / "s"), path="a/latents", mode="r")
    axes = PIPELINES[name][1]
    assert array.metadata.dimension_names == ("step", *axes)
    assert array.metadata.codecs[0].channel_axis == axes.index("channel")
    assert run.attributes["pipeline"] == type(pipe).__name__
    assert run.attributes["guidance"] > 1


def test_a_pipeline_that_steps_frames_on_their_own_is_refused_and_goes_on(tmp_path: Path) -> None:
    """Diffusion forcing: each frame has a scheduler, a copy of the pipeline's, and a noise level of its own."""
    torch.manual_seed(0)
    pipe, options = of_wan(
        "SkyReelsV2DiffusionForcingPipeline", "SkyReelsV2Transformer3DModel", inject_sample_info=True
    )
    call = Caller(pipe, options)
    plain = call()
    with (
        warnings.catch_warnings(record=True) as warned,
        record(pipe, tmp_path / "s", run="a") as recording,
    ):
        warnings.simplefilter("always")
        recorded = call(callback_on_step_end=recording)
    assert torch.equal(plain, recorded)
    assert "it is not recorded, sampling goes on" in str([str(line.message) for line in warned])
    assert "a" not in TrajectoryStore.open(tmp_path / "s")
