"""sample(options): pictures and videos from a trained EqM, walks from a trained CDiT, in a folder.

OUT/000000.png (.mp4, .gif)   one a sample; of a walk the real frames above the predicted ones
OUT/contact_sheet.png         the first of them
OUT/samples.npz               of pictures, arr_0, uint8 [N, H, W, 3]: what tools for FID read
OUT/samples.json              settings, and what each sample was made from
OUT/runs/                     with `record`, a TrajectoryStore of every sampling step
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
from PIL import Image

from halfstep.autoencoders import Autoencoder, load_for
from halfstep.errors import InputError, NumericsError
from halfstep.generate.makers import EqMMaker, Made, Maker, Progress, Recorders, SampleOptions, WalkMaker
from halfstep.generate.outputs import (
    Pixels,
    contact_sheet,
    grid,
    strip,
    write_gif,
    write_npy,
    write_npz,
    write_picture,
    write_video,
)
from halfstep.models import About, Checkpoint, EqM, read_checkpoint
from halfstep.precision import PrecisionPolicy, open_device, prepare, usable
from halfstep.sampling import NullRecorder, Recorder, StoreRecorder
from halfstep.store import TrajectoryStore
from halfstep.store.commit import alone, store_errors, write_durably
from halfstep.team import Team

_SHEET = 64  # samples on the contact sheet
_FORMATS = ("png", "mp4", "gif", "npy")
_PUBLISHED_AUTOENCODER = "stabilityai/sd-vae-ft-ema"  # of the published checkpoints, which do not say it
# What may differ when the same folder is filled further.
_MAY_GROW = ("number", "device", "output")


@dataclass(frozen=True)
class SampleReport:
    """What was `made`, and what was `there` from an earlier call. `updates`: mean number of sampling steps a sample
    took; None, as the rate is, when nothing was new."""

    output: str
    network: str
    policy: str
    made: int
    there: int
    samples_per_second: float | None
    updates: float | None
    contact_sheet: str | None = None
    npz: str | None = None


def sample(options: SampleOptions, progress: Progress | None = None) -> SampleReport:
    """Make the samples of `options` that are not in the folder yet. Under torchrun the processes share them.

    Raises InputError when checkpoint, options or folder do not fit together, NumericsError when a sample is not finite.
    """
    progress = progress or Progress()
    with Team.join() as team, ExitStack() as stack:
        device = open_device(team.device(options.device))
        checkpoint = _read(options)
        wanted_policy = PrecisionPolicy.parse(options.precision)
        policy, line = team.on_leader(lambda: usable(wanted_policy.resolve(device, "sample"), device, "sample"))
        if line is not None and not wanted_policy.is_auto and team.leads:
            progress.note(line)
        writer = _Writer(options, _autoencoder(options, checkpoint.about, device))
        network = prepare(checkpoint.build(ema=options.ema).to(device), policy)
        make: type[EqMMaker] | type[WalkMaker] = EqMMaker if isinstance(network, EqM) else WalkMaker
        maker: Maker = make(options, network, checkpoint.about, device)  # type: ignore[arg-type]
        team.on_leader(lambda: stack.enter_context(alone(options.output)))
        team.on_leader(lambda: _claim(options, checkpoint, policy))
        store = TrajectoryStore.create(options.output / "runs") if options.record else None
        size = min(options.batch_size, options.number)
        batches = [range(first, first + size) for first in range(0, options.number, size)]
        # Process 0 looks for all: others may write already.
        missing = team.on_leader(
            lambda: [batch for batch in batches if not all(writer.is_there(n) for n in batch if n < options.number)]
        )
        there = team.on_leader(lambda: sum(map(writer.is_there, range(options.number))))
        mine = missing[team.rank :: team.size]
        progress.start(sum(map(len, mine)), maker.steps)
        started, updates = time.monotonic(), []
        for batch in mine:
            # The last batch is as full as all others: kernels for other sizes may round differently.
            wanted = [number for number in batch if number < options.number]
            with _recording(store, maker, batch, wanted, options, policy) as recorders:
                made = maker.make(batch, recorders, progress)
                _require_finite(made, batch, policy)
            writer.write(wanted, made)
            updates += [made.updates] * len(wanted)
        everyone = [count for part in team.gather(lambda: updates) for count in part]
        seconds = time.monotonic() - started
        report = SampleReport(
            output=str(options.output),
            network=checkpoint.about.name,
            policy=str(policy),
            made=options.number - there,
            there=there,
            samples_per_second=round(len(everyone) / seconds, 3) if everyone else None,
            updates=round(float(np.mean(everyone)), 1) if everyone else None,
        )
        return team.on_leader(lambda: writer.finish(maker, report))


class _Writer:
    """The files of samples, decoded."""

    def __init__(self, options: SampleOptions, autoencoder: Autoencoder | None) -> None:
        self._options, self._autoencoder, self._folder = options, autoencoder, options.output

    def is_there(self, number: int) -> bool:
        return any(self._path(number, suffix).exists() for suffix in _FORMATS)

    def write(self, numbers: list[int], made: Made) -> None:
        """Decode and write the samples of a batch, which begins with `numbers`, but those that are there."""
        for place, number in enumerate(numbers):
            if self.is_there(number):
                continue
            latents = made.latents[place]
            if self._autoencoder is None:
                write_npy(self._path(number, "npy"), latents.float().cpu().numpy())
                continue
            walk = made.real is not None
            pixels = self._decoded(latents, walk)
            if walk:
                assert made.real is not None
                real = self._decoded(made.real[place], walk)
                self._write_walk(number, real, pixels)
            else:
                self._write_one(number, pixels)

    def finish(self, maker: Maker, report: SampleReport) -> SampleReport:
        """What is made of all samples together."""
        path, numbers = self._folder / "samples.json", range(self._options.number)
        content = json.loads(path.read_text())
        content["samples"] = [{"sample": number, **maker.facts(number)} for number in numbers]
        with store_errors(path):
            write_durably(path, json.dumps(content, indent=1).encode())
        if self._autoencoder is None:
            return report
        shown = [self._shown(number) for number in numbers[:_SHEET]]
        write_picture(self._folder / "contact_sheet.png", contact_sheet(shown))
        report = replace(report, contact_sheet=str(self._folder / "contact_sheet.png"))
        if not self._path(0, "png").exists() or maker.frames > 1:
            return report
        shape = np.asarray(Image.open(self._path(0, "png"))).shape
        rows = (np.asarray(Image.open(self._path(number, "png"))) for number in numbers)
        write_npz(self._folder / "samples.npz", rows, (len(numbers), *shape))
        return replace(report, npz=str(self._folder / "samples.npz"))

    def _decoded(self, latents: torch.Tensor, walk: bool) -> Pixels:
        """uint8 [H, W, 3] of latents [C, H, W]; [T, H, W, 3] of a walk [S, C, H, W] or a clip [C, T, H, W]."""
        assert self._autoencoder is not None
        if walk:
            return self._autoencoder.pictures(latents)
        if latents.dim() == 3 or self._autoencoder.spec.temporal_factor > 1:
            alone: Pixels = self._autoencoder.pictures(latents.unsqueeze(0))[0]
            return alone
        return self._autoencoder.pictures(latents.transpose(0, 1))

    def _write_one(self, number: int, pixels: Pixels) -> None:
        suffix = self._options.format or ("png" if pixels.ndim == 3 else "mp4")
        path = self._path(number, suffix)
        if suffix == "png":
            write_picture(path, pixels if pixels.ndim == 3 else strip(pixels))
        else:
            frames = pixels[None] if pixels.ndim == 3 else pixels
            (write_gif if suffix == "gif" else write_video)(path, frames, self._options.fps)

    def _write_walk(self, number: int, real: Pixels, predicted: Pixels) -> None:
        suffix = self._options.format or "png"
        path = self._path(number, suffix)
        if suffix == "png":
            write_picture(path, grid([*real, *predicted], len(real), 1))
        else:
            both = np.stack([grid([a, b], 1, 1) for a, b in zip(real, predicted, strict=True)])
            (write_gif if suffix == "gif" else write_video)(path, both, self._options.fps)

    def _shown(self, number: int) -> Pixels:
        """A sample as one picture."""
        picture = self._path(number, "png")
        if picture.exists():
            return np.asarray(Image.open(picture).convert("RGB"))
        path = next(self._path(number, suffix) for suffix in _FORMATS if self._path(number, suffix).exists())
        with av.open(str(path)) as container:
            return strip(np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]))

    def _path(self, number: int, suffix: str) -> Path:
        return self._folder / f"{number:06d}.{suffix}"


def _read(options: SampleOptions) -> Checkpoint:
    known = {"num_frames": options.clip_len, "energy": options.energy}
    if options.format not in (None, *_FORMATS):
        raise InputError(f"format: got {options.format!r}; expected one of {', '.join(_FORMATS)}")
    if options.number < 1 or options.batch_size < 1 or options.steps < 2:
        raise InputError("sample: number and batch size are at least 1, steps at least 2")
    checkpoint = read_checkpoint(options.ckpt, **known)
    if options.model is not None and options.model != checkpoint.about.name:
        raise InputError(f"{options.ckpt}: holds {checkpoint.about.name}, not {options.model}")
    return checkpoint


def _autoencoder(options: SampleOptions, about: About, device: torch.device) -> Autoencoder | None:
    """That which the latents are of; None when they are not to be decoded."""
    if options.format == "npy":
        return None
    channels = about.config["in_channels"]
    published = _PUBLISHED_AUTOENCODER if about.latents is None and channels == 4 else None
    loaded = load_for(about.latents, channels, options.autoencoder or published)
    return loaded.prepared(device, PrecisionPolicy())


def _claim(options: SampleOptions, checkpoint: Checkpoint, policy: PrecisionPolicy) -> None:
    """Hold the folder's settings against these, or write them into one that is new."""
    folder = options.output
    wanted = {name: value for name, value in asdict(options).items() if name not in _MAY_GROW}
    # A run may have been trained on since: its samples would be of two networks.
    resolved = {**wanted, "ckpt": checkpoint.path, "policy": str(policy)}
    wanted = json.loads(json.dumps(resolved, default=str))
    path = folder / "samples.json"
    if path.exists():
        there = json.loads(path.read_text())["settings"]
        changed = [f"{n} {there.get(n)!r}, not {wanted[n]!r}" for n in wanted if there.get(n) != wanted[n]]
        if changed:
            raise InputError(f"{folder}: holds samples of other settings ({'; '.join(changed)}); name a new folder")
    elif any(not path.name.startswith(".") for path in folder.iterdir()):
        raise InputError(f"{folder}: holds something that is not samples; name a new folder")
    else:
        with store_errors(path):
            write_durably(path, json.dumps({"settings": wanted, "samples": []}, indent=1).encode())


@contextmanager
def _recording(
    store: TrajectoryStore | None,
    maker: Maker,
    batch: range,
    wanted: list[int],
    options: SampleOptions,
    policy: PrecisionPolicy,
) -> Iterator[Recorders | None]:
    """A recorder for each frame of each sample, finished when all went well; those that only fill the batch are not
    kept."""
    if store is None:
        yield None
        return
    with ExitStack() as stack:
        made: dict[tuple[int, int], Recorder] = {}
        for number in wanted:
            for frame in range(maker.frames):
                key = f"{number:06d}" if maker.frames == 1 else f"{number:06d}-{frame:03d}"
                if key in store:  # of a call that was interrupted; the same seed makes the same steps again
                    store.remove(key)
                noted: dict[str, Any] = {"seed": options.seed, "sample": number, "guidance": options.guidance_scale}
                recorder = StoreRecorder(store, key, model=str(options.ckpt), policy=str(policy), **noted)
                made[number, frame] = stack.enter_context(recorder)
        silent = NullRecorder()
        yield lambda frame: [made.get((number, frame), silent) for number in batch]


def _require_finite(made: Made, batch: range, policy: PrecisionPolicy) -> None:
    bad = [n for n, latent in zip(batch, made.latents, strict=True) if not torch.isfinite(latent).all()]
    if bad:
        raise NumericsError(f"sample {bad[0]} is not finite in {policy}; use --precision fp32, or a smaller step")
