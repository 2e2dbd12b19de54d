"""halfstep bench train: a training step against the plain published recipe, on the same data."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import torch

from halfstep.autoencoders import load_autoencoder, to_pixels
from halfstep.bench.autoencoder import sd_vae_shaped
from halfstep.bench.cases import Case
from halfstep.bench.compare import document, in_turn, ratio
from halfstep.bench.timing import Call
from halfstep.config import validate
from halfstep.data.pictures import load_fitted
from halfstep.data.sources import SourceConfig
from halfstep.data.toy_world import write_toy_world
from halfstep.encode import EncodeOptions, encode
from halfstep.machine import open_device, peak_memory_mb
from halfstep.models import About, EqM
from halfstep.models.objectives import eqm_loss
from halfstep.precision import PrecisionPolicy, probe
from halfstep.progress import Progress
from halfstep.spec import PixelSpec
from halfstep.store.dataset import DatasetStore
from halfstep.train.config import TrainConfig
from halfstep.train.data import open_data
from halfstep.train.loop import train
from halfstep.train.meter import forward_operations
from halfstep.train.resume import would_begin

_DECAY, _RATE = 0.9999, 1e-4
_PRECISIONS = ("auto", "fp32", "bf16-mixed", "bf16-true")


@torch.random.fork_rng(devices=[])
def bench_train(
    *, model: str = "EqM-S/2", size: int = 256, batch: int = 16, steps: int = 2, rounds: int = 3, memory: bool = True
) -> dict[str, Any]:
    """Seconds of a training step of `model` on pictures of `size` pixels, in batches of `batch`.

    The plain recipe: fp32, an SD-VAE-shaped encoder (83.7M parameters, random weights) in the loop, AdamW as it comes,
    an average kept tensor by tensor, the loss brought to the host in each step. Then the same on latents from a store;
    and `halfstep train` on that store, on a GPU compiled too. `steps` are timed after one that is not, `rounds` times
    in turn. Peak memory is that of one step in a fresh process. The limit is what the matrix products alone would take
    at the rate that was measured for them, and `mfu` its share of the step.
    """
    with tempfile.TemporaryDirectory(prefix="halfstep-bench-") as scratch:
        folder = Path(scratch)
        _prepare(folder, size, batch * (steps + 1))
        plain = {name: _Plain(folder, model, size, batch, pixels) for name, pixels in _PLAIN.items()}
        runs = count()
        policies: dict[str, str] = {}

        def ours(name: str, settings: dict[str, Any]) -> float:
            seconds, policies[name] = _time_ours(folder, model, settings, batch, steps, runs)
            return seconds

        cases: dict[str, Callable[[], float | None]] = {
            **{name: partial(recipe.time, steps) for name, recipe in plain.items()},
            **{name: partial(ours, name, settings) for name, settings in _ours().items()},
        }
        timings = in_turn(cases, rounds)
        network = next(iter(plain.values())).network
        limits = _limits(network, batch, policies)
        facts: dict[str, Any] = {
            "model": model,
            "size": size,
            "batch": batch,
            "parameters": sum(p.numel() for p in network.parameters()),
            "policies": policies,
            "speedup_over_encoder_in_the_loop": ratio(timings, *_names("auto", pixels=True)),
            "speedup_with_latents_on_both_sides": ratio(timings, *_names("auto", pixels=False)),
            "speedup_in_fp32": ratio(timings, *_names("fp32", pixels=False)),
            "limit_seconds": {name: float(f"{limit:.4g}") for name, limit in limits.items()},
            "mfu": {name: round(limit / timings[name].median, 3) for name, limit in limits.items()},
        }
        if memory:
            facts["peak_memory_mb"] = {name: _peak(folder, model, size, batch, name) for name in cases}
        return document("train", timings, **facts)


def call_of(case: Case, scratch: Path) -> Call:
    """Train a small EqM for ten steps on a store of latents of the built-in codec, with the checkpoint at the end."""
    values = _small_run(case, scratch)

    def call() -> None:
        with tempfile.TemporaryDirectory(dir=scratch) as results:
            train(validate({**values, "results_dir": results}, TrainConfig, "bench"))

    return call


def chosen(case: Case, scratch: Path) -> PrecisionPolicy:
    """What `call_of` trains in."""
    config = validate({**_small_run(case, scratch), "results_dir": str(scratch)}, TrainConfig, "bench")
    return would_begin(config, open_data(config, 1), torch.device(case.device))[1].policy


def _small_run(case: Case, scratch: Path) -> dict[str, Any]:
    write_toy_world(scratch / "world", walks=1, frames=16)
    latents = EncodeOptions(scratch / "latents", precision="fp32", storage="fp16", size=(case.size, case.size))
    encode([SourceConfig(path=scratch / "world")], latents)
    return {
        "model": {"network": "EqM", "hidden_size": 64, "depth": 4, "num_heads": 4},
        "data_path": str(scratch / "latents"),
        "global_batch_size": 8,
        "num_workers": 0,
        "precision": case.precision,
        "device": case.device,
        "steps": 10,
    }


_PLAIN = {"plain, fp32, encoder in the loop": True, "plain, fp32, latents": False}


def _names(precision: str, *, pixels: bool) -> tuple[str, str]:
    return next(name for name, has_pixels in _PLAIN.items() if has_pixels == pixels), _name(precision)


def _name(precision: str) -> str:
    return f"halfstep, {precision}, latents"


def _ours() -> dict[str, dict[str, Any]]:
    """Settings of `halfstep train` by the name of the case."""
    settings: dict[str, dict[str, Any]] = {_name(precision): {"precision": precision} for precision in _PRECISIONS}
    if torch.cuda.is_available():
        settings["halfstep, auto, compiled, latents"] = {"precision": "auto", "compile": True}
    return settings


def _limits(network: EqM, batch: int, policies: dict[str, str]) -> dict[str, float]:
    """Seconds that the products of a step take at their rate, which is measured now: one that was kept may come from a
    busier moment."""
    rates = probe(open_device("auto"), refresh=True)
    operations = 3 * batch * forward_operations(About("EqM", network.config))  # backward twice as many
    computes = {name: PrecisionPolicy.parse(policy).compute for name, policy in policies.items()}
    return {name: operations / rates.products_per_second(compute) for name, compute in computes.items()}


def _prepare(folder: Path, size: int, pictures: int) -> None:
    """Pictures, an autoencoder, and a store of their latents."""
    write_toy_world(folder / "world", walks=-(-pictures // 16), frames=16, size=(640, 480))
    for poses in (folder / "world").rglob("*.pkl"):
        poses.unlink()  # pictures in class folders then
    vae = sd_vae_shaped(folder / "vae")
    options = EncodeOptions(folder / "latents", vae, storage="fp16", size=(size, size), batch_size=4)
    encode([SourceConfig(path=folder / "world")], options)


class _Plain:
    """What a straightforward script does."""

    def __init__(self, folder: Path, model: str, size: int, batch: int, pixels: bool) -> None:
        torch.manual_seed(0)
        self._batch, self._size, self._folder = batch, size, folder
        self._encoder = load_autoencoder(str(folder / "vae")) if pixels else None
        self._store = DatasetStore.open(folder / "latents")
        self._device = open_device("auto")
        if self._encoder is not None:
            self._encoder = self._encoder.prepared(self._device, PrecisionPolicy(), channels_last=False)
        self.network = EqM.named(model, size // 8, 1000).train().to(self._device)
        self._average = copy.deepcopy(self.network).requires_grad_(False)
        self._optimizer = torch.optim.AdamW(self.network.parameters(), lr=_RATE, weight_decay=0)
        self._batches = self._read()

    def time(self, steps: int) -> float:
        """Seconds of a step."""
        self._step()
        start = time.perf_counter()
        for _ in range(steps):
            self._step()
        return (time.perf_counter() - start) / steps

    def _step(self) -> float:
        latents = next(self._batches).to(self._device)
        labels = torch.randint(1000, (len(latents),), device=self._device)
        loss = eqm_loss(self.network, latents, labels).mean()
        self._optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        self._optimizer.step()
        parameters = dict(self.network.named_parameters())
        with torch.no_grad():
            for name, average in self._average.named_parameters():
                average.mul_(_DECAY).add_(parameters[name], alpha=1 - _DECAY)
        return loss.item()

    @torch.no_grad()
    def _read(self) -> Iterator[torch.Tensor]:
        paths = sorted((self._folder / "world").rglob("*.jpg"))
        keys = self._store.keys()
        for first in count(step=self._batch):
            if self._encoder is None:
                latents = [self._store.read(keys[(first + i) % len(keys)], 0, 1)[0] for i in range(self._batch)]
                yield torch.from_numpy(np.stack(latents))
                continue
            chosen = [paths[(first + i) % len(paths)] for i in range(self._batch)]
            pictures = np.stack([load_fitted(path, PixelSpec(self._size, self._size)) for path in chosen])
            # Contiguous [B, 3, H, W], as the usual transforms deliver it.
            pixels = to_pixels(torch.from_numpy(pictures)).contiguous().to(self._device)
            yield self._encoder.scaled(self._encoder.encode(pixels).draw()).clone()


class _Clock(Progress):
    def __init__(self) -> None:
        self.times: list[float] = []

    def advance(self, units: int = 1, *, written: int = 0) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.times.append(time.perf_counter())


def _time_ours(
    folder: Path, model: str, settings: dict[str, Any], batch: int, steps: int, runs: Iterator[int]
) -> tuple[float, str]:
    """Seconds of a step of `halfstep train`, reading included, and the policy it chose."""
    values = {
        "model": model,
        "data_path": str(folder / "latents"),
        "results_dir": str(folder / f"run{next(runs)}"),
        "num_classes": 1000,
        "global_batch_size": batch,
        **settings,
        "steps": steps + 1,
        "log_every": 10**6,
    }
    clock = _Clock()
    report = train(validate(values, TrainConfig, "bench"), clock)
    return (clock.times[-1] - clock.times[0]) / steps, report.policy


def _peak(folder: Path, model: str, size: int, batch: int, case: str) -> float:
    script = (
        f"from halfstep.bench.train import print_own_peak; print_own_peak(*{[str(folder), model, size, batch, case]})"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return float(json.loads(result.stdout.splitlines()[-1]))


def print_own_peak(folder: str, model: str, size: int, batch: int, case: str) -> None:
    """Run two steps of `case` in this process and print the most memory it ever held, in MB."""
    if case in _PLAIN:
        _Plain(Path(folder), model, size, batch, _PLAIN[case]).time(1)
    else:
        with tempfile.TemporaryDirectory(dir=folder) as run:
            (Path(run) / "latents").symlink_to(Path(folder) / "latents")
            _time_ours(Path(run), model, _ours()[case], batch, 1, count())
    sys.stdout.write(f"{peak_memory_mb(open_device('auto')):.1f}\n")
