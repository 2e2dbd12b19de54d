"""taef2: the tiny autoencoder of the FLUX.2 latent space (TAESD, MIT), from its two weight files."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import nn

from halfstep.autoencoders.base import Autoencoder, weights_sha256
from halfstep.errors import InputError
from halfstep.spec import LatentSpec

CHANNELS, FACTOR, _WIDTH = 32, 8, 64
ENCODER_FILE, DECODER_FILE = "taef2_encoder.pth", "taef2_decoder.pth"


class _Block(nn.Module):
    """Residual block of three convolutions; the innermost ones first mix channels under one norm over the picture."""

    def __init__(self, pooled: bool = False) -> None:
        super().__init__()
        self.conv = nn.Sequential(_conv(), nn.ReLU(), _conv(), nn.ReLU(), _conv())
        self.pool: nn.Module | None = None
        if pooled:
            wide = 4 * _WIDTH
            self.pool = nn.Sequential(
                nn.Conv2d(_WIDTH, wide, 1, bias=False),
                nn.GroupNorm(4, wide),
                nn.ReLU(),
                nn.Conv2d(wide, _WIDTH, 1, bias=False),
            )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.pool is not None:
            x = x + self.pool(x)
        return torch.relu(self.conv(x) + x)


class _Clamp(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 3 * torch.tanh(x / 3)


class _FromUnitRange(nn.Module):
    """Our pixels are in [-1, 1], the network's in [0, 1]."""

    def __init__(self, network: nn.Module, *, encodes: bool) -> None:
        super().__init__()
        self.network, self.encodes = network, encodes

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.network((x + 1) / 2) if self.encodes else self.network(x) * 2 - 1
        return result


def _conv(inputs: int = _WIDTH, outputs: int = _WIDTH, **options: Any) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, padding=1, **options)


def _encoder() -> nn.Sequential:
    stages: list[nn.Module] = [_conv(inputs=3), _Block()]
    for pooled in (False, False, True):
        stages += [_conv(stride=2, bias=False), *(_Block(pooled) for _ in range(3))]
    return nn.Sequential(*stages, _conv(outputs=CHANNELS))


def _decoder() -> nn.Sequential:
    stages: list[nn.Module] = [_Clamp(), _conv(inputs=CHANNELS), nn.ReLU(), *(_Block(pooled=True) for _ in range(3))]
    for blocks in (3, 3, 1):
        stages += [nn.Upsample(scale_factor=2), _conv(bias=False), *(_Block() for _ in range(blocks))]
    return nn.Sequential(*stages, _conv(outputs=3))


def _load(network: nn.Module, path: Path) -> nn.Module:
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        network.load_state_dict(state)
    except (OSError, RuntimeError, TypeError, ValueError, EOFError, AttributeError, UnpicklingError) as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"{path}: not the weights of taef2 ({reason}); download the file again") from error
    return network.float().eval()


def taef2(folder: Path) -> Autoencoder:
    """Load `taef2_encoder.pth` and `taef2_decoder.pth` from `folder`. Latents [B, 32, H/8, W/8]."""
    encoder = _load(_encoder(), folder / ENCODER_FILE)
    decoder = _load(_decoder(), folder / DECODER_FILE)
    spec = LatentSpec(str(folder), CHANNELS, FACTOR, weights_sha256=weights_sha256(encoder, decoder))
    return Autoencoder(
        spec,
        _FromUnitRange(encoder, encodes=True).eval(),
        _FromUnitRange(decoder, encodes=False).eval(),
        reload=partial(taef2, folder),
    )
