"""Real networks of the libraries, small, with weights that half types cannot run without help."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


def sdxl_like_vae(gain: float = 4e6) -> Any:
    """A small AutoencoderKL whose decoder overflows as SDXL's does: a residual block in the middle adds values to the
    stream that fp16 cannot hold, and the norms behind it bring them back."""
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(32, 64),
        layers_per_block=1,
        norm_num_groups=8,
        sample_size=32,
    ).eval()
    with torch.no_grad():
        conv = vae.decoder.mid_block.resnets[0].conv2
        conv.weight *= gain
        conv.bias *= gain
    return vae


def t5_stack(gain: float = 3e4, width: int = 64) -> Any:
    """A T5 encoder of three layers, whose feed-forward layers hand on large values, as the large published ones do."""
    from transformers import T5Config, T5EncoderModel

    torch.manual_seed(0)
    config = T5Config(
        vocab_size=64,
        d_model=width,
        d_kv=width // 4,
        d_ff=2 * width,
        num_layers=3,
        num_heads=4,
        feed_forward_proj="gated-gelu",
    )
    model = T5EncoderModel(config).eval()
    with torch.no_grad():
        for block in model.encoder.block[1:]:
            block.layer[-1].DenseReluDense.wo.weight *= gain
    return model


class Decoder(nn.Module):
    """The decoder of an autoencoder alone."""

    def __init__(self, vae: Any) -> None:
        super().__init__()
        self.decoder = vae.decoder

    def forward(self, latents: torch.Tensor) -> torch.Tensor:
        pixels: torch.Tensor = self.decoder(latents)
        return pixels


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


def leaves_beyond(limit: float, module: nn.Module, *args: Any, **kwargs: Any) -> dict[str, tuple[bool, bool]]:
    """Leaves whose input, and whose output, is beyond `limit` in a forward pass."""
    found: dict[str, tuple[bool, bool]] = {}
    names = {child: name for name, child in module.named_modules()}

    def look(child: nn.Module, given: Any, made: Any) -> None:
        too_large = [
            any(isinstance(t, torch.Tensor) and t.is_floating_point() and t.abs().max() > limit for t in tensors)
            for tensors in (given, made if isinstance(made, tuple) else (made,))
        ]
        if any(too_large):
            found[names[child]] = (too_large[0], too_large[1])

    hooks = [child.register_forward_hook(look) for child in module.modules() if not any(child.children())]
    try:
        with torch.no_grad():
            module(*args, **kwargs)
    finally:
        for hook in hooks:
            hook.remove()
    return found
