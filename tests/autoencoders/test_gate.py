"""The gate, on networks that overflow for real: a convolution whose weights are large enough for some pixels."""

from __future__ import annotations

import torch
from torch import nn

from halfstep.autoencoders import Autoencoder, encode_gate
from halfstep.engine import Gate
from halfstep.precision import PrecisionPolicy
from halfstep.spec import LatentSpec
from halfstep.store.formats import largest_finite

CPU = torch.device("cpu")


class Amplifier(nn.Module):
    """Multiplies and divides again: fp16 overflows in between where pixels are large, fp32 does not."""

    def __init__(self, gain: float, back: float) -> None:
        super().__init__()
        self.gain, self.back = nn.Conv2d(3, 3, 1, bias=False), nn.Conv2d(3, 3, 1, bias=False)
        with torch.no_grad():
            self.gain.weight.copy_(torch.eye(3)[:, :, None, None] * gain)
            self.back.weight.copy_(torch.eye(3)[:, :, None, None] * back)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.back(self.gain(self.gain(pixels)))


def amplifier(gain: float = 300.0, back: float = 1 / 90000) -> Autoencoder:
    return Autoencoder(
        LatentSpec("amplifier", 3, 1), Amplifier(gain, back), nn.Identity(), reload=lambda: amplifier(gain, back)
    )


def gate(policy: str, storage: str = "fp16", **options: float) -> Gate:
    parsed = PrecisionPolicy.parse(policy)
    return encode_gate(amplifier(**options).prepared(CPU, parsed), parsed, CPU, largest=largest_finite(storage))


def batch() -> torch.Tensor:
    pixels = torch.full((4, 3, 2, 2), 0.25)
    pixels[1] = 0.9  # 0.9 * 300 * 300 is more than fp16 holds
    return pixels


def test_a_spoiled_sample_is_computed_again_in_fp32_and_the_others_are_not() -> None:
    checked = gate("16-true")(batch())
    assert (checked.retried, checked.refused) == ({1}, {})
    torch.testing.assert_close(checked.outputs[0][1], batch()[1], rtol=1e-5, atol=0)
    alone = batch()
    alone[1] = 0.25
    assert torch.equal(gate("16-true")(alone).outputs[0][0], checked.outputs[0][0])


def test_nothing_is_repeated_where_nothing_overflows() -> None:
    checked = gate("bf16-true")(batch())
    assert (checked.retried, checked.refused) == (set(), {})


def test_what_is_not_finite_in_fp32_either_is_refused_with_its_reason() -> None:
    pixels = batch()
    pixels[3, 0, 0, 0] = float("nan")
    checked = gate("16-true")(pixels)
    assert checked.refused == {3: "are not finite, in fp32 too"}
    assert checked.retried == {1, 3}
    assert gate("fp32")(pixels).refused.keys() == {3}


def test_what_does_not_fit_the_storage_type_is_refused() -> None:
    checked = gate("fp32", back=1.0)(batch())
    assert list(checked.refused) == [1]
    assert "beyond 65504 of the storage type; use --storage bf16 or fp32" in checked.refused[1]
    assert gate("fp32", storage="bf16", back=1.0)(batch()).refused == {}
