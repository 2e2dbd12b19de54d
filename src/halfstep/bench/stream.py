"""halfstep bench stream: PeakNet as it is run today against its fused form in half, and the engine around it."""

from __future__ import annotations

import copy
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from halfstep.bench.cases import Case
from halfstep.bench.compare import document, in_turn, ratio
from halfstep.bench.memory import ENVIRONMENT, peak_of, resident_mb
from halfstep.bench.timing import Call
from halfstep.data.diffraction import diffraction_frame
from halfstep.engine import Lanes, lane_count
from halfstep.machine import open_device
from halfstep.models import PeakNet
from halfstep.precision import PrecisionPolicy, prepare, probe, settle, torch_dtype
from halfstep.progress import SILENT, Progress
from halfstep.stream.engine import StreamEngine, StreamOptions
from halfstep.stream.events import Array, Event, Identity, Message
from halfstep.stream.model import Inference, ModelSpec
from halfstep.stream.parts import Outputs
from halfstep.stream.peaks import find_peaks, match_peaks
from halfstep.stream.prepare import Preparation
from halfstep.stream.sinks.cxi import CxiSettings
from halfstep.stream.sources.base import Incoming, Source
from halfstep.stream.sources.simulated import RandomSource

_FORMS = ("plain fp32", "autocast", "true half", "fused fp32", "fused half")

_SMALL = files("halfstep.demo") / "peaknet_small.safetensors"
_LABELED_PIXELS, _LABELED_PEAKS = 1920, 300
_SOAK_SHAPE = (1, 32, 32)
_SOAK_LOOKS = 20


def bench_stream(
    *, sizes: tuple[int, ...] = (256, 512), rounds: int = 5, events: int = 48, frames: int = 100, memory: bool = True
) -> dict[str, Any]:
    """The published PeakNet of 33M parameters (random weights) on one frame at a time in one thread, in CPU seconds on
    a CPU: as a plain fp32 loop, under autocast as it is run today, in true half, fused in fp32 and fused in half. The
    engine on `events` events of the first size against its lanes alone, in wall seconds. Labeling against the loop that
    compares the whole image for each label. The trained small model on `frames` simulated ones: peaks of each form
    against the truth and against plain fp32. Peak memory of each form in a process of its own."""
    device = open_device("auto")
    half = _half(device)
    torch.manual_seed(0)
    network = PeakNet().eval()
    forms = {name: _form(name, network, device, half) for name in _FORMS}
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        cases: dict[str, Callable[[], float | None]] = {}
        for size in sizes:
            x = torch.randn(1, 1, size, size, generator=torch.Generator().manual_seed(0)).to(device)
            for name, form in forms.items():
                cases[f"{name}, {size}"] = partial(_seconds, form, x)
        with torch.inference_mode():
            for case in cases.values():
                case()
            timings = in_turn(cases, rounds)
        labeling = _labeling(rounds)
    finally:
        torch.set_num_threads(before)
    facts: dict[str, Any] = {"half": half, "auto": str(settle("auto", device, "sample").policy)}
    for size in sizes:
        plain = f"plain fp32, {size}"
        facts[f"speedup_over_plain_fp32_{size}"] = {
            name: ratio(timings, plain, f"{name}, {size}") for name in forms if name != "plain fp32"
        }
        facts[f"fused_half_over_autocast_{size}"] = ratio(timings, f"autocast, {size}", f"fused half, {size}")
    facts["weight_mb"] = {name: round(_weight_bytes(form) / 1e6, 1) for name, form in forms.items()}
    facts["engine"] = _engine(sizes[0], events, rounds, device)
    largest = timings[f"fused half, {sizes[-1]}"].median * (_LABELED_PIXELS / sizes[-1]) ** 2
    facts["labeling"] = {**labeling, "share_of_fused_half": round(labeling["ours_ms"] / 1e3 / largest, 5)}
    facts["peaks"] = _peaks_found(frames, device, half)
    if memory:
        facts["peak_memory_mb"] = {name: _peak_memory(name, sizes[-1]) for name in forms}
    return document("stream", timings, **facts)


def call_of(case: Case, scratch: Path) -> Call:
    """Send 16 frames through the engine with the trained small network, in memory, into a new run's folder."""
    frames = _counts(16, case.size)

    def call() -> None:
        with tempfile.TemporaryDirectory(dir=scratch) as folder, as_file(_SMALL) as weights:
            outputs = Outputs(Path(folder) / "run", CxiSettings())
            StreamEngine(_FromMemory(frames), _options(case, weights), outputs).run()

    return call


def chosen(case: Case, scratch: Path) -> PrecisionPolicy:
    """What `call_of` computes in."""
    with as_file(_SMALL) as weights:
        return StreamEngine(_FromMemory(_counts(1, case.size)), _options(case, weights)).policy


def _options(case: Case, weights: Path) -> StreamOptions:
    return StreamOptions(
        ModelSpec(str(weights)),
        precision=case.precision,
        batch_size=4,
        preparation=Preparation(size=(case.size, case.size)),
        device=case.device,
    )


def bench_soak(events: int, progress: Progress = SILENT) -> dict[str, Any]:
    """`events` small events through the engine with a network that does nearly nothing: the rate, and what memory does
    after the first tenth."""
    with tempfile.TemporaryDirectory(prefix="halfstep-bench-") as scratch:
        spec = ModelSpec("halfstep.bench.stream:nearly_nothing")
        size = (_SOAK_SHAPE[1], _SOAK_SHAPE[2])
        options = StreamOptions(
            spec, precision="fp32", batch_size=64, preparation=Preparation(size=size), queue_bytes=64 << 20
        )
        resident: list[float] = []
        step = max(1, events // _SOAK_LOOKS)

        class Looking(Progress):
            done = 0

            def advance(self, units: int = 1, *, written: int = 0) -> None:
                if (self.done + units) // step > self.done // step:
                    resident.append(resident_mb())
                self.done += units
                progress.advance(units)

        progress.start(events)
        source = RandomSource(_SOAK_SHAPE, events)
        outputs = Outputs(Path(scratch) / "run", None)
        report = StreamEngine(source, options, outputs, progress=Looking()).run()
    settled = resident[max(1, len(resident) // 10) :]
    return document(
        "stream soak",
        {},
        events=report.balance["out"],
        held=report.held,
        events_per_second=report.events_per_second,
        resident_mb=[round(value, 1) for value in resident],
        growth_after_the_first_tenth=round(settled[-1] / settled[0] - 1, 4),
    )


def nearly_nothing() -> nn.Module:
    """A network for the soak: pixels more than four deviations above the mean."""
    network = nn.Conv2d(1, 1, 1)
    with torch.no_grad():
        network.weight.fill_(1.0)
        assert network.bias is not None
        network.bias.fill_(-4.0)
    return network


def _half(device: torch.device) -> str:
    """The half type that is faster on this device."""
    result = probe(device)
    return max(("bf16", "fp16"), key=lambda name: result.speedup(name, "sample"))


def _form(name: str, network: PeakNet, device: torch.device, half: str) -> nn.Module:
    """A copy of a network in one of the ways to run it: frames to logits, or fused to margins."""
    made = (network.fused() if name.startswith("fused") else copy.deepcopy(network)).to(device)
    if name == "autocast":
        return _Autocast(made, device.type, torch_dtype(half))
    true_half = "bf16-true" if half == "bf16" else "16-true"
    return prepare(made, PrecisionPolicy.parse(true_half if name.endswith("half") else "fp32"))


class _Autocast(nn.Module):
    """As networks are run in half today: fp32 weights and inputs, cast within."""

    def __init__(self, network: nn.Module, device: str, dtype: torch.dtype) -> None:
        super().__init__()
        self.network, self._device, self._dtype = network, device, dtype

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.autocast(self._device, self._dtype):
            logits: torch.Tensor = self.network(x)
        return logits


def _seconds(form: nn.Module, x: torch.Tensor) -> float:
    """CPU seconds on a CPU, where others may compute beside us; else wall seconds."""
    clock = time.process_time if x.device.type == "cpu" else time.perf_counter
    start = clock()
    form(x)
    if x.device.type == "cuda":
        torch.cuda.synchronize()
    return clock() - start


def _weight_bytes(form: nn.Module) -> int:
    return sum(tensor.nbytes for tensor in (*form.parameters(), *form.buffers()))


class _FromMemory(Source):
    guarantee = "numbered"

    def __init__(self, frames: list[Array]) -> None:
        self._events = iter([Event(Identity("r", "s", str(n), n), frame) for n, frame in enumerate(frames)])
        self._next = next(self._events, None)

    def receive(self, timeout_s: float) -> Incoming | None:
        event = self._next
        assert event is not None
        self._next = next(self._events, None)
        self.exhausted = self._next is None
        return Incoming(event.data.nbytes, lambda: Message((event,), "r", "s"), b"", "memory")


def _counts(events: int, size: int) -> list[Array]:
    """Frames of background alone."""
    rng = np.random.default_rng(0)
    return [rng.poisson(30, (1, size, size)).astype(np.uint16) for _ in range(events)]


def _engine(size: int, events: int, rounds: int, device: torch.device) -> dict[str, Any]:
    """The engine on frames as they come against the same batches through the same lanes."""
    with tempfile.TemporaryDirectory(prefix="halfstep-bench-") as scratch:
        torch.manual_seed(0)
        weights = Path(scratch) / "peaknet.pt"
        torch.save(PeakNet().state_dict(), weights)
        spec, batch = ModelSpec(str(weights)), 4
        policy = settle("auto", device, "sample").policy
        data = _counts(events, size)
        options = StreamOptions(
            spec, precision=str(policy), batch_size=batch, preparation=Preparation(size=(size, size))
        )
        folders: Iterator[Path] = (Path(scratch) / str(number) for number in range(10**6))

        def engine() -> float:
            outputs = Outputs(next(folders), CxiSettings())
            return StreamEngine(_FromMemory(data), options, outputs).run().seconds

        def alone() -> float:
            inference = Inference(spec, policy, str(device))
            count = lane_count(device, shared=True)
            dtype = torch_dtype(policy.compute if policy.is_mixed else policy.params)
            samples = torch.randn(batch, 1, size, size).to(dtype)
            with Lanes.open([inference] * count, "alone") as lanes:
                for future in [lanes.submit(samples) for _ in range(count)]:
                    future.result()
                start = time.perf_counter()
                for future in [lanes.submit(samples) for _ in range(math.ceil(events / batch))]:
                    future.result()
                return time.perf_counter() - start

        timings = in_turn({"engine": engine, "its lanes alone": alone}, rounds)
    return {
        "policy": str(policy),
        "size": size,
        "events": events,
        "seconds": {name: round(timing.median, 3) for name, timing in timings.items()},
        "spread": {name: [round(t.smallest, 3), round(t.largest, 3)] for name, t in timings.items()},
        "share_of_its_lanes_rate": round(timings["its lanes alone"].median / timings["engine"].median, 4),
    }


def _labeling(rounds: int) -> dict[str, Any]:
    """Peaks of one large frame: ours, and the loop over labels that compares the whole image for each."""
    mask = np.zeros((1, _LABELED_PIXELS, _LABELED_PIXELS), bool)
    rng = np.random.default_rng(0)
    for y, x in rng.integers(4, _LABELED_PIXELS - 4, (_LABELED_PEAKS, 2)):
        mask[0, y - 1 : y + 2, x - 1 : x + 2] = True
    found: dict[str, Array] = {}

    def timed(name: str, work: Callable[[Array], Array]) -> float:
        start = time.process_time()
        found[name] = work(mask)
        return time.process_time() - start

    timings = in_turn({"ours": lambda: timed("ours", find_peaks), "loop": lambda: timed("loop", _by_label)}, rounds)
    return {
        "pixels": _LABELED_PIXELS,
        "peaks": len(found["ours"]),
        "ours_ms": round(1e3 * timings["ours"].median, 3),
        "per_label_loop_ms": round(1e3 * timings["loop"].median, 1),
        "speedup": round(timings["loop"].median / timings["ours"].median, 1),
        "same_peaks": bool(np.allclose(found["ours"], found["loop"], atol=1e-3)),
    }


def _by_label(mask: Array) -> Array:
    """The loop over labels, image by image."""
    from scipy import ndimage

    peaks = []
    for image, plane in enumerate(mask):
        labels, count = ndimage.label(plane, np.ones((3, 3)))
        for label in range(1, count + 1):
            y, x = np.nonzero(labels == label)
            peaks.append((image, y.mean(), x.mean()))
    return np.array(peaks, np.float32).reshape(-1, 3)


@torch.inference_mode()
def _peaks_found(frames: int, device: torch.device, half: str) -> dict[str, Any]:
    """Of the trained small model on frames that it has not seen."""
    with as_file(_SMALL) as path:
        network = PeakNet.load(path)
    preparation = Preparation()
    found: dict[str, list[Array]] = {}
    truth = []
    forms = {name: _form(name, network, device, half) for name in _FORMS}
    for number in range(frames):
        frame = diffraction_frame(np.random.default_rng(50_000 + number), (256, 256))
        truth.append(frame.peaks)
        samples = replace(preparation, mask=frame.mask)(frame.values[None]).to(device)
        for name, form in forms.items():
            output = form(samples).float()
            margin = output[:, 1] - output[:, 0] if output.shape[1] == 2 else output[:, 0]
            found.setdefault(name, []).append(find_peaks((margin > 0).cpu().numpy())[:, 1:])
    return {
        name: {
            "against_truth": _agreement(peaks, truth),
            "against_plain_fp32": _agreement(peaks, found["plain fp32"]),
        }
        for name, peaks in found.items()
    }


def _agreement(found: list[Array], truth: list[Array]) -> dict[str, float]:
    matched = sum(match_peaks(ours, theirs) for ours, theirs in zip(found, truth, strict=True))
    return {
        "precision": round(matched / max(1, sum(map(len, found))), 4),
        "recall": round(matched / max(1, sum(map(len, truth))), 4),
    }


def _peak_memory(form: str, size: int) -> float:
    """MB of weights and of what computing one frame holds, in a fresh process; the median of three."""
    script = f"from halfstep.bench.stream import print_own_peak; print_own_peak({form!r}, {size})"
    env, peaks = {**os.environ, **ENVIRONMENT}, []
    for _ in range(3):
        result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, env=env)
        peaks.append(float(result.stdout))
    return round(statistics.median(peaks), 1)


@torch.inference_mode()
def print_own_peak(form: str, size: int) -> None:
    """Compute one frame in a form of the network and print the MB that its weights take, plus how much more the
    process, or the GPU, held while computing than before."""
    torch.set_num_threads(1)
    device = open_device("auto")
    network = _form(form, PeakNet().eval(), device, _half(device))
    x = torch.randn(1, 1, size, size, device=device)
    network(x[..., :64, :64])  # what libraries set up on their first call is not the network's
    peak = peak_of(partial(network, x), device)
    sys.stdout.write(f"{_weight_bytes(network) / 1e6 + peak.peak_mb - peak.held_mb:.1f}\n")
