"""What the suite measures. A case is a value that other processes, and the code of other revisions, can make their call
from: what is called here is long-standing public names alone, each imported when it is needed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from halfstep.bench.timing import Call


@dataclass(frozen=True)
class Case:
    """One workload at one size in one precision on one device. `size`: pixels on a side, of the kernel its rounds;
    `precision`: as PrecisionPolicy parses it, and not `auto`."""

    workload: str
    size: int
    precision: str
    device: str = "cpu"

    @property
    def name(self) -> str:
        return f"{self.workload} at {self.size}, {self.precision}"

    def make(self, scratch: Path) -> Call:
        """All that is set up once, in the folder `scratch` where it needs files; the call that is measured."""
        return WORKLOADS[self.workload].make(self, scratch)


@dataclass(frozen=True)
class Workload:
    """`task`: which `auto` decides for; `sizes`: those of a suite."""

    task: str
    sizes: tuple[int, ...]
    make: Callable[[Case, Path], Call]


def _forward(case: Case, network: Any, *inputs: Any) -> Call:
    """One forward pass as a prepared module runs."""
    import torch

    from halfstep.precision import PrecisionPolicy, prepare

    prepared = prepare(network.eval().to(case.device), PrecisionPolicy.parse(case.precision))
    placed = [value.to(case.device) for value in inputs]

    @torch.inference_mode()
    def call() -> None:
        prepared(*placed)

    return call


def _eqm(case: Case, scratch: Path) -> Call:
    import torch

    from halfstep.models import EqM

    torch.manual_seed(0)
    side = case.size // 8
    network = EqM.named("EqM-S/2", side, 1000)
    return _forward(case, network, torch.randn(1, 4, side, side), torch.ones(1), torch.zeros(1, dtype=torch.long))


def _cdit(case: Case, scratch: Path) -> Call:
    import torch

    from halfstep.models import CDiT

    torch.manual_seed(0)
    side, context = case.size // 8, 2
    network = CDiT.named("CDiT-S/2", side, context)
    frame, frames = torch.randn(1, 4, side, side), torch.randn(1, context, 4, side, side)
    return _forward(case, network, frame, torch.ones(1), torch.zeros(1, 3), frames, torch.ones(1))


def _peaknet(case: Case, scratch: Path) -> Call:
    import torch

    from halfstep.models import PeakNet

    torch.manual_seed(0)
    network = PeakNet(
        backbone_hidden_sizes=(16, 24, 32, 48),
        backbone_depths=(2, 2, 2, 2),
        bifpn_num_blocks=1,
        bifpn_num_features=32,
        seg_out_channels=32,
    )
    return _forward(case, network, torch.randn(1, 1, case.size, case.size))


def _autoencoder(case: Case, scratch: Path) -> Call:
    import torch

    from halfstep.autoencoders import load_autoencoder
    from halfstep.bench.autoencoder import sd_vae_shaped
    from halfstep.precision import PrecisionPolicy

    folder = sd_vae_shaped(scratch / "vae", channels=(32, 64, 64, 64))
    autoencoder = load_autoencoder(folder).prepared(case.device, PrecisionPolicy.parse(case.precision))
    pixels = torch.randn(1, 3, case.size, case.size, generator=torch.Generator().manual_seed(0)).to(case.device)
    return lambda: autoencoder.encode(pixels)


def _encode(case: Case, scratch: Path) -> Call:
    from halfstep.bench.encode import call_of

    return call_of(case, scratch)


def _sample(case: Case, scratch: Path) -> Call:
    from halfstep.bench.sample import call_of

    return call_of(case)


def _train(case: Case, scratch: Path) -> Call:
    from halfstep.bench.train import call_of

    return call_of(case, scratch)


def _stream(case: Case, scratch: Path) -> Call:
    from halfstep.bench.stream import call_of

    return call_of(case, scratch)


def _kernel(case: Case, scratch: Path) -> Call:
    import numpy as np

    matrix = np.random.default_rng(0).standard_normal((64, 64)) / 8

    def call() -> None:
        values = matrix
        for _ in range(case.size):
            values = np.tanh(matrix @ values)

    return call


SUITE = {
    "EqM-S/2": Workload("sample", (128, 256), _eqm),
    "CDiT-S/2": Workload("sample", (128, 256), _cdit),
    "PeakNet-small": Workload("sample", (128, 256), _peaknet),
    "AutoencoderKL-small": Workload("encode", (64, 128), _autoencoder),
    "encode": Workload("encode", (64,), _encode),
    "sample": Workload("sample", (64,), _sample),
    "train": Workload("train", (32,), _train),
    "stream": Workload("sample", (128,), _stream),
}
WORKLOADS = {**SUITE, "kernel": Workload("sample", (100,), _kernel)}
