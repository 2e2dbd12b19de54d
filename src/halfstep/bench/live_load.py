"""halfstep bench live-load: the network behind published frame rates of live streams, in true half against fp32."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from halfstep.bench.compare import document, in_turn, ratio
from halfstep.bench.memory import ENVIRONMENT, peak_of
from halfstep.bench.timing import run_block
from halfstep.errors import HalfstepError
from halfstep.machine import open_device
from halfstep.models.livestream_load import LiveStreamLoad, load_inputs
from halfstep.precision import PrecisionPolicy, prepare
from halfstep.precision.memory import forward_footprint, prefers_channels_last
from halfstep.progress import SILENT, Progress

_SMALL = 16  # width of a load that sets the libraries up
_CALLS_ON_A_GPU = 10  # in a row, which the host does not wait between


@dataclass(frozen=True)
class Way:
    """How the load is run: prepared for a policy, or in fp32 under torch's autocast as it comes, `half` then."""

    precision: str
    half: str | None = None


def ways(device: torch.device) -> dict[str, Way]:
    """By name; the first is what the others are held against."""
    found = {"fp32": Way("fp32"), "autocast bf16": Way("fp32", "bfloat16"), "true bf16": Way("bf16-true")}
    if device.type == "cuda":
        found |= {"autocast fp16": Way("fp32", "float16"), "true fp16": Way("16-true")}
    return found


def bench_live_load(
    *, width: int = 192, batch: int = 2, rounds: int = 5, device: str = "auto", progress: Progress = SILENT
) -> dict[str, Any]:
    """The load of base `width` on `batch` frames of 64 pixels with the same random weights in each way: in fp32
    (without TF32), under torch's autocast, and prepared in a half type.

    seconds: of one forward, the processor's or the GPU's own, in turn, after one each that does not count. memory_mb:
    in a fresh process each, where libraries have set themselves up on a small load: `loading`, the most it held until
    the network was there, and `peak`, the most during a forward, weights among it, the median of three; `planned`
    without weights. saved: the share of fp32's peak. error: relative root mean square of what comes out, against fp32.
    """
    target = open_device(device)
    chosen = ways(target)
    progress.start(len(chosen) + rounds)
    memory = {}
    for name, way in chosen.items():
        progress.show(f"memory: {name}")
        memory[name] = _memory_in_own_process(name, way, width, batch, str(target))
        progress.advance()
    networks = {way.precision: opened(width, way, target) for way in chosen.values()}
    inputs = given(batch, target)
    calls = {name: partial(_call, networks[way.precision], way, inputs, target) for name, way in chosen.items()}
    results = {name: call().float() for name, call in calls.items()}

    def timed(name: str) -> float:
        progress.show(f"time: {name}")
        count = _CALLS_ON_A_GPU if target.type == "cuda" else 1
        cost_s = run_block(calls[name], count, str(target)).cost_s / count
        if name == list(chosen)[-1]:
            progress.advance()
        return cost_s

    timings = in_turn({name: partial(timed, name) for name in chosen}, rounds)
    exact, others = results["fp32"], list(chosen)[1:]
    return document(
        "live-load",
        timings,
        width=width,
        batch=batch,
        threads=torch.get_num_threads(),
        parameters=sum(parameter.numel() for parameter in networks["fp32"].parameters()),
        gmac_per_sample=round(_gmac(width), 1),
        speedup={name: ratio(timings, "fp32", name) for name in others},
        forwards_per_second={name: round(1 / timing.median, 2) for name, timing in timings.items()},
        error={name: float(f"{(results[name] - exact).norm() / exact.norm():.3g}") for name in others},
        memory_mb=memory,
        saved={name: round(1 - memory[name]["peak"] / memory["fp32"]["peak"], 4) for name in others},
    )


def opened(width: int, way: Way, device: torch.device) -> nn.Module:
    """The load with random weights of seed 0, rounded to the types of the way. It gets those types before it gets
    memory, and its weights then layer by layer, so that there are never two copies of more than a layer's."""
    policy = PrecisionPolicy.parse(way.precision)
    with torch.device("meta"):
        network = LiveStreamLoad(width).eval()
    prepare(network, policy, channels_last=prefers_channels_last(network, policy, device)).to_empty(device=device)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for layer in network.modules():
            if isinstance(layer, (nn.Conv2d, nn.Linear)):
                bound = layer.weight[0].numel() ** -0.5  # as torch draws them
                for parameter in layer.parameters():
                    parameter.copy_(torch.empty(parameter.shape).uniform_(-bound, bound, generator=generator))
            elif isinstance(layer, (nn.GroupNorm, nn.LayerNorm)):
                layer.reset_parameters()
    return network


def given(batch: int, device: torch.device) -> tuple[torch.Tensor, ...]:
    """Frames of normal noise of seed 0, and the middle of all timesteps."""
    generator = torch.Generator().manual_seed(0)
    frame, timestep, previous = load_inputs(batch)
    noise = (torch.randn(value.shape, generator=generator).to(device) for value in (frame, previous))
    return next(noise), torch.full_like(timestep, 500.0).to(device), next(noise)


@torch.no_grad()  # as most do; in inference mode autocast keeps no half copies
def _call(network: nn.Module, way: Way, inputs: tuple[torch.Tensor, ...], device: torch.device) -> torch.Tensor:
    with nullcontext() if way.half is None else torch.autocast(device.type, getattr(torch, way.half)):
        result: torch.Tensor = network(*inputs)
    return result


def _gmac(width: int) -> float:
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        LiveStreamLoad(width).eval()(*load_inputs())
    return int(counter.get_total_flops()) / 2e9


def _memory_in_own_process(name: str, way: Way, width: int, batch: int, device: str) -> dict[str, float]:
    arguments = json.dumps({**asdict(way), "width": width, "batch": batch, "device": device})
    script = f"from halfstep.bench.live_load import print_own_memory; print_own_memory({arguments!r})"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env={**os.environ, **ENVIRONMENT}
    )
    if done.returncode:
        raise HalfstepError(f"live-load, {name}: failed ({(done.stderr.splitlines() or ['no word'])[-1]})")
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def print_own_memory(text: str) -> None:
    """Print the MB of a way, measured in this process, as JSON."""
    values = json.loads(text)
    way, device = Way(values["precision"], values["half"]), torch.device(values["device"])
    inputs = given(values["batch"], device)

    def call_of(width: int) -> Callable[[], torch.Tensor]:
        return partial(_call, opened(width, way, device), way, inputs, device)

    call_of(_SMALL)()
    before = peak_of(lambda: None, device).held_mb
    calls: list[Callable[[], torch.Tensor]] = []
    loading = peak_of(lambda: calls.append(call_of(values["width"])), device).peak_mb
    peak = median(peak_of(calls[0], device).peak_mb for _ in range(3))
    found = {"loading": round(loading - before, 1), "peak": round(peak - before, 1)}
    if way.half is None:
        with torch.device("meta"):
            shapes = LiveStreamLoad(values["width"]).eval()
        planned = forward_footprint(shapes, inputs, PrecisionPolicy.parse(way.precision), device)
        found["planned"] = round(planned.peak / 1e6, 1)
    sys.stdout.write(f"\n{json.dumps(found)}\n")
