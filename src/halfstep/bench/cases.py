"""What the suite measures. A case is a value that other processes, and the code of other revisions, can make their call
from: what is called here is long-standing public names alone, each imported when it is needed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from halfstep.bench.timing import Call

if TYPE_CHECKING:
    from halfstep.autoencoders import Autoencoder
    from halfstep.precision import PrecisionPolicy


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

    def chosen(self, scratch: Path) -> PrecisionPolicy:
        """What the workload runs in here where it is asked for this case's precision, which may be `auto`."""
        return WORKLOADS[self.workload].chosen(self, scratch)


@dataclass(frozen=True)
class Workload:
    """`task`: which `auto` decides for; `sizes`: those of a suite. `make` and `chosen`: see Case."""

    task: str
    sizes: tuple[int, ...]
    make: Callable[[Case, Path], Call]
    chosen: Callable[[Case, Path], PrecisionPolicy]


def _network(task: str, sizes: tuple[int, ...], build: Callable[[int], tuple[Any, ...]]) -> Workload:
    """One forward pass as a prepared module runs; `build`: from the size to the network and its inputs."""

    def make(case: Case, scratch: Path) -> Call:
        import torch

        from halfstep.precision import PrecisionPolicy, prepare

        network, *inputs = build(case.size)
        prepared = prepare(network.eval().to(case.device), PrecisionPolicy.parse(case.precision))
        placed = [value.to(case.device) for value in inputs]

        @torch.inference_mode()
        def call() -> None:
            prepared(*placed)

        return call

    def chosen(case: Case, scratch: Path) -> PrecisionPolicy:
        import torch

        from halfstep.precision import network_trial, settle

        network, *inputs = build(case.size)
        device = torch.device(case.device)
        return settle(
            case.precision, device, task, trial=lambda: network_trial(network, tuple(inputs), 1, device)
        ).policy

    return Workload(task, sizes, make, chosen)


def _eqm(size: int) -> tuple[Any, ...]:
    import torch

    from halfstep.models import EqM

    torch.manual_seed(0)
    side = size // 8
    network = EqM.named("EqM-S/2", side, 1000)
    return network, torch.randn(1, 4, side, side), torch.ones(1), torch.zeros(1, dtype=torch.long)


def _cdit(size: int) -> tuple[Any, ...]:
    import torch

    from halfstep.models import CDiT

    torch.manual_seed(0)
    side, context = size // 8, 2
    network = CDiT.named("CDiT-S/2", side, context)
    frame, frames = torch.randn(1, 4, side, side), torch.randn(1, context, 4, side, side)
    return network, frame, torch.ones(1), torch.zeros(1, 3), frames, torch.ones(1)


def _peaknet(size: int) -> tuple[Any, ...]:
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
    return network, torch.randn(1, 1, size, size)


def _small_vae(scratch: Path) -> Autoencoder:
    from halfstep.autoencoders import load_autoencoder
    from halfstep.bench.autoencoder import sd_vae_shaped

    return load_autoencoder(sd_vae_shaped(scratch / "vae", channels=(32, 64, 64, 64)))


def _autoencoder(case: Case, scratch: Path) -> Call:
    import torch

    from halfstep.precision import PrecisionPolicy

    autoencoder = _small_vae(scratch).prepared(case.device, PrecisionPolicy.parse(case.precision))
    pixels = torch.randn(1, 3, case.size, case.size, generator=torch.Generator().manual_seed(0)).to(case.device)
    return lambda: autoencoder.encode(pixels)


def _autoencoder_chosen(case: Case, scratch: Path) -> PrecisionPolicy:
    import torch

    from halfstep.precision import network_trial, settle

    encoder, device = _small_vae(scratch).encoder, torch.device(case.device)
    pixels = (torch.empty(1, 3, case.size, case.size),)
    return settle(
        case.precision, device, "encode", trial=lambda: network_trial(encoder, pixels, 1, device, lane=True)
    ).policy


def _encode(case: Case, scratch: Path) -> Call:
    from halfstep.bench.encode import call_of

    return call_of(case, scratch)


def _encode_chosen(case: Case, scratch: Path) -> PrecisionPolicy:
    from halfstep.bench.encode import chosen

    return chosen(case, scratch)


def _sample(case: Case, scratch: Path) -> Call:
    from halfstep.bench.sample import call_of

    return call_of(case)


def _sample_chosen(case: Case, scratch: Path) -> PrecisionPolicy:
    from halfstep.bench.sample import chosen

    return chosen(case)


def _train(case: Case, scratch: Path) -> Call:
    from halfstep.bench.train import call_of

    return call_of(case, scratch)


def _train_chosen(case: Case, scratch: Path) -> PrecisionPolicy:
    from halfstep.bench.train import chosen

    return chosen(case, scratch)


def _stream(case: Case, scratch: Path) -> Call:
    from halfstep.bench.stream import call_of

    return call_of(case, scratch)


def _stream_chosen(case: Case, scratch: Path) -> PrecisionPolicy:
    from halfstep.bench.stream import chosen

    return chosen(case, scratch)


def _by_probe(case: Case, scratch: Path) -> PrecisionPolicy:
    from halfstep.precision import settle

    return settle(case.precision, case.device, "sample").policy


def _kernel(case: Case, scratch: Path) -> Call:
    import numpy as np

    matrix = np.random.default_rng(0).standard_normal((64, 64)) / 8

    def call() -> None:
        values = matrix
        for _ in range(case.size):
            values = np.tanh(matrix @ values)

    return call


SUITE = {
    "EqM-S/2": _network("sample", (128, 256), _eqm),
    "CDiT-S/2": _network("sample", (128, 256), _cdit),
    "PeakNet-small": _network("sample", (128, 256), _peaknet),
    "AutoencoderKL-small": Workload("encode", (64, 128), _autoencoder, _autoencoder_chosen),
    "encode": Workload("encode", (64,), _encode, _encode_chosen),
    "sample": Workload("sample", (64,), _sample, _sample_chosen),
    "train": Workload("train", (32,), _train, _train_chosen),
    "stream": Workload("sample", (128,), _stream, _stream_chosen),
}
WORKLOADS = {**SUITE, "kernel": Workload("sample", (100,), _kernel, _by_probe)}
