"""Five networks of five kinds: which of their modules must stay fp32 when the rest is fp16?

python examples/audit_networks.py OUT writes a page for each into OUT. The weights are small and random, but for
PeakNet's; the autoencoder and the T5 have values as large as published ones of their kind.
"""

import argparse
from importlib.resources import as_file, files
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from torch import nn
from transformers import T5Config, T5EncoderModel

from halfstep.models import CDiT, EqM, PeakNet
from halfstep.precision import audit
from halfstep.precision.audits.page import render_page


def randomized(network: nn.Module) -> nn.Module:
    """Published networks of this kind begin with zeros, which would make the output zero."""
    for parameter in network.parameters():
        if parameter.dim() > 1 and not parameter.any():
            nn.init.normal_(parameter, std=0.05)
    return network.eval()


def eqm() -> tuple[nn.Module, list[tuple[torch.Tensor, ...]]]:
    network = EqM(input_size=16, patch_size=2, hidden_size=128, depth=6, num_heads=4, num_classes=10)
    return randomized(network), [(torch.randn(2, 4, 16, 16), torch.rand(2), torch.arange(2)) for _ in range(3)]


def cdit() -> tuple[nn.Module, list[tuple[torch.Tensor, ...]]]:
    network = CDiT(input_size=16, context_size=2, patch_size=2, hidden_size=128, depth=6, num_heads=4)
    calls = [
        (
            torch.randn(2, 4, 16, 16),
            torch.randint(0, 1000, (2,)).float(),
            torch.randn(2, 3),
            torch.randn(2, 2, 4, 16, 16),
            torch.rand(2),
        )
        for _ in range(3)
    ]
    return randomized(network), calls


def peaknet() -> tuple[nn.Module, list[tuple[torch.Tensor, ...]]]:
    with as_file(files("halfstep.demo") / "peaknet_small.safetensors") as path:
        return PeakNet.load(path), [(torch.randn(1, 1, 128, 128),) for _ in range(3)]


def autoencoder() -> tuple[nn.Module, list[tuple[torch.Tensor, ...]]]:
    """Its decoder overflows as SDXL's does: a block in its middle adds large values to the stream."""
    network = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(32, 64),
        layers_per_block=1,
        norm_num_groups=8,
    ).eval()
    with torch.no_grad():
        network.decoder.mid_block.resnets[0].conv2.weight *= 4e6
    return network, [(torch.randn(1, 3, 32, 32),) for _ in range(3)]


def t5() -> tuple[nn.Module, list[tuple[torch.Tensor, ...]]]:
    """Its feed-forward layers hand on large values. transformers keeps `wo` in fp32 for that: is it right?"""
    config = T5Config(vocab_size=64, d_model=64, d_kv=16, d_ff=128, num_layers=3, num_heads=4)
    network = T5EncoderModel(config).eval()
    for part in (network, network.encoder):
        part._keep_in_fp32_modules = None  # let the audit find it
    with torch.no_grad():
        for block in network.encoder.block[1:]:
            block.layer[-1].DenseReluDense.wo.weight *= 3e5
    return network, [(torch.randint(64, (2, 12)),) for _ in range(3)]


def main(out: Path) -> None:
    for make in (eqm, cdit, peaknet, autoencoder, t5):
        torch.manual_seed(0)
        network, calls = make()
        report = audit(network, calls)
        name = make.__name__
        (out / name).mkdir(parents=True, exist_ok=True)
        (out / name / "report.html").write_text(render_page(report, name))
        print(f"{name}: {report.verdict}; {', '.join(report.islands) or 'all of it half'}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    main(parser.parse_args().out)
