"""halfstep bench simulate: simulated half arithmetic against the device's own, and against the speed of fp32."""

from __future__ import annotations

import copy
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from halfstep.autoencoders import load_autoencoder
from halfstep.bench.autoencoder import sd_vae_shaped
from halfstep.bench.compare import document, in_turn
from halfstep.machine import open_device
from halfstep.models import CDiT, EqM, PeakNet
from halfstep.precision import prepare, simulate
from halfstep.precision.audits.calls import floats_of, relative_error
from halfstep.progress import SILENT, Progress

POLICIES = ("16-true", "bf16-true")


def bench_simulate(*, rounds: int = 5, progress: Progress = SILENT) -> dict[str, Any]:
    """For five networks the error of half arithmetic against fp32, simulated and as the device computes it, and the
    seconds of a simulated forward pass beside one in fp32: of the processor, on one thread, in turn."""
    device = open_device("auto")
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    results: dict[str, Any] = {}
    progress.start(5)
    cases: dict[str, Callable[[], float | None]] = {}
    try:
        with tempfile.TemporaryDirectory(prefix="halfstep-bench-") as scratch, torch.no_grad():
            for name, module, inputs in networks(Path(scratch)):
                progress.advance()
                module, inputs = module.eval().to(device), tuple(value.to(device) for value in inputs)
                results[name] = {"policies": {policy: _errors(module, inputs, policy) for policy in POLICIES}}
                cases[f"{name}, fp32"] = partial(_seconds, module, inputs, None)
                cases[f"{name}, simulated"] = partial(_seconds, module, inputs, POLICIES[0])
            timings = in_turn(cases, rounds)
    finally:
        torch.set_num_threads(before)
    for name, facts in results.items():
        ratio = timings[f"{name}, simulated"].median / timings[f"{name}, fp32"].median
        facts["simulated_over_fp32"] = round(ratio, 2)
    return document("simulate", timings, networks=results)


def networks(scratch: Path) -> Iterator[tuple[str, nn.Module, tuple[torch.Tensor, ...]]]:
    """Name, module and the inputs of a call. Weights are random, and nowhere zero all over."""
    from transformers import T5Config, T5EncoderModel

    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        one = torch.ones(1)
        eqm = EqM.named("EqM-S/2", 32, 1000)
        yield "EqM-S/2", _filled(eqm), (normal(1, 4, 32, 32), one, torch.zeros(1, dtype=torch.long))
        cdit = CDiT.named("CDiT-S/2", 28, 2)
        frames = normal(1, 2, 4, 28, 28)
        yield "CDiT-S/2", _filled(cdit), (normal(1, 4, 28, 28), 500 * one, normal(1, 3), frames, one)
        autoencoder: Any = load_autoencoder(sd_vae_shaped(scratch / "vae"))
        yield "AutoencoderKL", autoencoder.decoder.vae.decoder, (normal(1, 4, 16, 16),)
        yield "PeakNet", PeakNet(), (normal(1, 1, 256, 256),)
        config = T5Config(vocab_size=512, d_model=512, d_kv=64, d_ff=1024, num_layers=6, num_heads=8)
        yield "T5 encoder", T5EncoderModel(config), (torch.randint(512, (2, 64), generator=generator),)


def _filled(network: nn.Module) -> nn.Module:
    """These networks begin with zeros, which would make their output zero."""
    for parameter in network.parameters():
        if parameter.dim() > 1 and not parameter.any():
            nn.init.normal_(parameter, std=0.02)
    return network


def _errors(module: nn.Module, inputs: tuple[torch.Tensor, ...], policy: str) -> dict[str, float]:
    exact = floats_of(module(*inputs))
    with simulate(module, policy) as run:
        simulated = relative_error(floats_of(run(*inputs)), exact)
    prepared = prepare(copy.deepcopy(module), run.policy, channels_last=False)
    real = relative_error(floats_of(prepared(*inputs)), exact)
    return {"simulated": _rounded(simulated), "real": _rounded(real), "real_over_simulated": round(real / simulated, 3)}


def _seconds(module: nn.Module, inputs: tuple[torch.Tensor, ...], policy: str | None) -> float:
    if policy is None:
        start = time.process_time()
        module(*inputs)
        return time.process_time() - start
    with simulate(module, policy) as run:
        run(*inputs)  # what is set up once for a module
        start = time.process_time()
        run(*inputs)
        return time.process_time() - start


def _rounded(value: float) -> float:
    return float(f"{value:.4g}")
