"""The gate on encoders: nothing that is not finite, or does not fit the storage type, gets through."""

from __future__ import annotations

import torch

from halfstep.autoencoders.base import Autoencoder
from halfstep.engine.gate import Compute, Gate
from halfstep.precision import PrecisionPolicy

_ADVICE = " of the storage type; use --storage bf16 or fp32"


def encode_gate(
    autoencoder: Autoencoder,
    policy: PrecisionPolicy,
    device: torch.device,
    *,
    largest: float = torch.finfo(torch.float32).max,
    channels_last: bool | None = None,
) -> Gate:
    """The gate before the encoder of `autoencoder`, which is prepared for `policy` on `device`. Its inputs are pixels
    as in `Autoencoder.encode`, its outputs the mean and, of a variational autoencoder, the logarithm of the variance;
    `largest` is that of the storage type."""
    reload = autoencoder.reload

    def encode(encoder: Autoencoder) -> Compute:
        return lambda pixels: [tensor for tensor in encoder.encode(pixels) if tensor is not None]

    def load_exact() -> Compute:
        return encode(reload().prepared(device, PrecisionPolicy(), channels_last=channels_last))

    exact = None if policy.compute == "fp32" else load_exact
    return Gate(encode(autoencoder), exact, largest=largest, advice=_ADVICE)
