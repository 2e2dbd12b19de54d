"""halfstep bench sample: pictures a second from an EqM, against the plain loop of updates."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from halfstep.bench.cases import Case
from halfstep.bench.compare import document, in_turn, ratio
from halfstep.bench.timing import Call
from halfstep.machine import open_device
from halfstep.models import FAMILIES, EqM
from halfstep.precision import PrecisionPolicy, network_trial, prepare, settle
from halfstep.sampling import GuidedField, drive, sample_eqm

_PRECISIONS = ("auto", "fp32")
_STEP, _MOMENTUM = 0.0017, 0.3


@torch.random.fork_rng(devices=[])
def bench_sample(
    *, model: str = "EqM-S/2", size: int = 256, batch: int = 2, updates: int = 249, rounds: int = 3
) -> dict[str, Any]:
    """Seconds of `updates` updates (ngd, without guidance) of `batch` samples at `size` pixels, decoding excluded.

    The plain loop: fp32, the whole network with its condition in each update. Weights are random, the last layers too,
    so that half precision has something to be compared on: the difference from the plain loop's samples is relative to
    what the sampler moved (rms).
    """
    device = open_device("auto")
    generator = torch.Generator().manual_seed(0)
    networks = {precision: _network(model, size, generator.manual_seed(0)) for precision in ("plain", *_PRECISIONS)}
    noise = torch.randn(batch, 4, size // 8, size // 8, generator=generator).to(device)
    labels = torch.arange(batch, device=device) % 1000
    samples: dict[str, torch.Tensor] = {}
    policies: dict[str, str] = {}

    def plain() -> None:
        network = networks["plain"].to(device)
        x, velocity = noise.clone(), torch.zeros_like(noise)
        time = torch.ones(batch, device=device)
        with torch.no_grad():
            for _ in range(updates):
                velocity = network(x + _STEP * _MOMENTUM * velocity, time, labels)
                x = x + _STEP * velocity
        samples["plain"] = _arrived(x)

    def ours(precision: str) -> Callable[[], None]:
        policy = settle(precision, device, "sample").policy
        policies[f"halfstep, {precision}"] = str(policy)
        network = prepare(networks[precision].to(device), policy)

        def run() -> None:
            samples[precision] = _sample(network, noise, labels, updates)

        return run

    names = {f"halfstep, {precision}": precision for precision in _PRECISIONS}
    cases: dict[str, Callable[[], float | None]] = {"plain loop, fp32": plain}
    cases |= {name: ours(precision) for name, precision in names.items()}
    timings = in_turn(cases, rounds)
    moved = (samples["plain"] - noise.cpu()).square().mean().sqrt()
    return document(
        "sample",
        timings,
        model=model,
        size=size,
        batch=batch,
        updates=updates,
        policies=policies,
        images_per_second={name: round(batch / timing.median, 4) for name, timing in timings.items()},
        speedup=ratio(timings, "plain loop, fp32", "halfstep, auto"),
        speedup_in_fp32=ratio(timings, "plain loop, fp32", "halfstep, fp32"),
        difference={
            name: float(f"{(samples[precision] - samples['plain']).square().mean().sqrt() / moved:.2g}")
            for name, precision in names.items()
        },
    )


def call_of(case: Case) -> Call:
    """One sample of EqM-S/8 in eight updates."""
    network = _network("EqM-S/8", case.size, torch.Generator().manual_seed(0))
    prepared = prepare(network.to(case.device), PrecisionPolicy.parse(case.precision))
    noise = torch.randn(1, *network.latent_shape, generator=torch.Generator().manual_seed(0)).to(case.device)
    labels = torch.zeros(1, dtype=torch.long, device=case.device)
    return lambda: _sample(prepared, noise, labels, updates=8)


def chosen(case: Case) -> PrecisionPolicy:
    """What the network of `call_of` runs in."""
    network, device = EqM.named("EqM-S/8", case.size // 8, 1000), torch.device(case.device)
    example = FAMILIES["EqM"].example(network)
    return settle(case.precision, device, "sample", trial=lambda: network_trial(network, example, 1, device)).policy


def _sample(network: nn.Module, noise: torch.Tensor, labels: torch.Tensor, updates: int) -> torch.Tensor:
    """As `halfstep sample` does it."""
    assert isinstance(network, EqM)
    field = GuidedField(network, labels)
    return _arrived(drive(sample_eqm(field, noise, updates=updates, step_size=_STEP, momentum=_MOMENTUM)))


def _network(model: str, size: int, generator: torch.Generator) -> EqM:
    torch.manual_seed(0)
    network = EqM.named(model, size // 8, 1000).eval()
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if "adaLN" in name or name.startswith("final_layer"):  # zero in a new network
                parameter.normal_(std=0.02, generator=generator)
    return network


def _arrived(x: torch.Tensor) -> torch.Tensor:
    """On the host, which waits for it."""
    return x.cpu()
