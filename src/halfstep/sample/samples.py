"""sample(options): pictures and videos from a trained EqM, walks from a trained CDiT or livestream, in a folder.

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
from halfstep.data.outputs import (
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
from halfstep.errors import InputError, NumericsError, StoreError
from halfstep.files import alone, write_durably
from halfstep.machine import open_device
from halfstep.models import Checkpoint, read_checkpoint
from halfstep.precision import PrecisionPolicy, network_trial, prepare, settle
from halfstep.progress import SILENT, Progress
from halfstep.sample.makers import MAKERS, Made, Maker, Recorders
from halfstep.sample.options import FORMATS, SampleOptions
from halfstep.sampling import NullRecorder, Recorder, StoreRecorder
from halfstep.sampling.noise import own_seed
from halfstep.settings import require_same
from halfstep.spec import LatentSpec
from halfstep.store import TrajectoryFormat, TrajectoryStore
from halfstep.team import Team

_YOUNG = 0.05  # an average that has more of its first weights than this is not one of a trained network yet
_SHEET = 64  # samples on the contact sheet
_PUBLISHED_AUTOENCODER = "stabilityai/sd-vae-ft-ema"  # of the published checkpoints, which do not say it
_PUBLISHED_CLIP = 16  # frames, as the published commands have it
# What may differ when the same folder is filled further; instead of the precision the policy is kept that it gave.
_MAY_GROW = ("number", "device", "output", "precision")


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


def sample(options: SampleOptions, progress: Progress = SILENT) -> SampleReport:
    """Make the samples of `options` that are not in the folder yet. Under torchrun the processes share them.

    Raises InputError when checkpoint, options or folder do not fit together, NumericsError when a sample is not finite.
    """
    with Team.join() as team, ExitStack() as stack:
        progress = progress if team.leads else SILENT
        device = open_device(team.device(options.device, shared=True))
        options.require_sound()
        checkpoint = _read(options)
        about, before = checkpoint.about, _settings(options.output)
        kept = None if before is None else before["policy"]
        options.require_for(about.network)
        options = replace(options, steps=options.steps or about.family.steps)
        network = checkpoint.build(ema=options.ema).to(device)
        size = min(options.batch_size, options.number)
        policy, notes = team.on_leader(
            lambda: settle(
                options.precision,
                device,
                "sample",
                kept,
                lambda: network_trial(network, about.family.example(network), size, device),
            )
        )
        for line in (*notes, *_on_average(options, checkpoint)):
            progress.note(line)
        prepare(network, policy)
        maker = MAKERS[about.network](options, network, about, device)
        autoencoder = _autoencoder(options, maker.spec, network.in_channels, progress)
        writer = _Writer(options, None if autoencoder is None else autoencoder.prepared(device, PrecisionPolicy()))
        team.on_leader(lambda: stack.enter_context(alone(options.output)))
        team.on_leader(lambda: _claim(options, checkpoint, policy))
        store = TrajectoryStore.create(options.output / "runs") if options.record else None
        batches = [range(first, first + size) for first in range(0, options.number, size)]
        # Process 0 looks for all: others may write already.
        missing = team.on_leader(
            lambda: [batch for batch in batches if not all(writer.is_there(n) for n in batch if n < options.number)]
        )
        there = team.on_leader(lambda: sum(map(writer.is_there, range(options.number))))
        mine = missing[team.rank :: team.size]
        progress.start(sum(map(len, mine)) * maker.steps)

        def make_mine() -> list[float]:
            """The number of updates of each sample."""
            updates: list[float] = []
            for batch in mine:
                # The last batch is as full as all others: kernels for other sizes may round differently.
                wanted = [number for number in batch if number < options.number]
                with _recording(store, maker, batch, wanted, options, policy) as recorders:
                    made = maker.make(batch, recorders, progress)
                    _require_finite(made, batch, policy)
                writer.write(wanted, made)
                updates += [made.updates] * len(wanted)
            return updates

        started = time.monotonic()
        everyone = [count for part in team.gather(make_mine) for count in part]
        seconds = time.monotonic() - started
        report = SampleReport(
            output=str(options.output),
            network=about.name,
            policy=str(policy),
            made=options.number - there,
            there=there,
            samples_per_second=round(len(everyone) / seconds, 3) if everyone else None,
            updates=round(float(np.mean(everyone)), 1) if everyone else None,
        )
        pictures = about.family.items == "labeled" and len(network.latent_shape) == 3
        return team.on_leader(lambda: writer.finish(maker, report, pictures=pictures))


class _Writer:
    """The files of samples, decoded."""

    def __init__(self, options: SampleOptions, autoencoder: Autoencoder | None) -> None:
        self._options, self._autoencoder, self._folder = options, autoencoder, options.output

    def is_there(self, number: int) -> bool:
        return any(self._path(number, suffix).exists() for suffix in FORMATS)

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

    def finish(self, maker: Maker, report: SampleReport, *, pictures: bool) -> SampleReport:
        """What is made of all samples together; `pictures`: each is one, not a clip or a walk."""
        path, numbers = self._folder / "samples.json", range(self._options.number)
        content = json.loads(path.read_text())
        content["samples"] = [{"sample": number, **maker.facts(number)} for number in numbers]
        write_durably(path, json.dumps(content, indent=1).encode())
        if self._autoencoder is None:
            return report
        shown = [self._shown(number) for number in numbers[:_SHEET]]
        write_picture(self._folder / "contact_sheet.png", contact_sheet(shown))
        report = replace(report, contact_sheet=str(self._folder / "contact_sheet.png"))
        if not (pictures and self._path(0, "png").exists()):
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
        path = next(self._path(number, suffix) for suffix in FORMATS if self._path(number, suffix).exists())
        with av.open(str(path)) as container:
            return strip(np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]))

    def _path(self, number: int, suffix: str) -> Path:
        return self._folder / f"{number:06d}.{suffix}"


def _read(options: SampleOptions) -> Checkpoint:
    checkpoint = read_checkpoint(options.ckpt, num_frames=options.clip_len, energy=options.energy)
    if options.video and options.clip_len is None and checkpoint.about.config.get("num_frames") == 1:
        checkpoint = read_checkpoint(options.ckpt, num_frames=_PUBLISHED_CLIP, energy=options.energy)
    if options.model is not None and options.model != checkpoint.about.name:
        raise InputError(f"{options.ckpt}: holds {checkpoint.about.name}, not {options.model}")
    return checkpoint


def _on_average(options: SampleOptions, checkpoint: Checkpoint) -> list[str]:
    """A line where the moving average is still too young to sample from."""
    if not options.ema or (checkpoint.ema_start or 0) <= _YOUNG:
        return []
    return [
        f"{checkpoint.path}: {checkpoint.ema_start:.0%} of the average are still the weights that training began with; "
        "those last trained (--no-ema) may be better"
    ]


def _autoencoder(
    options: SampleOptions, spec: LatentSpec | None, channels: int, progress: Progress
) -> Autoencoder | None:
    """That which the latents are of; None when they are not to be decoded."""
    if options.format == "npy":
        return None
    name = options.autoencoder
    if name is None and spec is None and channels == 4:
        name = _PUBLISHED_AUTOENCODER
        progress.note(f"{options.ckpt}: does not say its autoencoder; {name} decodes, as published")
    return load_for(spec, channels, name)


def _settings(folder: Path) -> dict[str, Any] | None:
    """Settings of the samples in a folder; None where there is no sample yet.

    Raises InputError when samples.json is not of this package.
    """
    path = folder / "samples.json"
    if not path.exists():
        return None
    try:
        settings: dict[str, Any] = json.loads(path.read_text())["settings"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path}: does not tell the settings of samples ({error}); name a new folder") from error
    begun = any(found.stem.isdecimal() and found.suffix[1:] in FORMATS for found in folder.iterdir())
    return settings if begun else None


def _claim(options: SampleOptions, checkpoint: Checkpoint, policy: PrecisionPolicy) -> None:
    """Hold these settings against those of the samples that are there, or write them where there are none yet."""
    folder = options.output
    given = {name: value for name, value in asdict(options).items() if name not in _MAY_GROW}
    # A run may have been trained on since: its samples would be of two networks.
    given |= {"ckpt": checkpoint.path, "policy": str(policy)}
    whole = {name: value.resolve() if isinstance(value, Path) else value for name, value in given.items()}
    wanted = json.loads(json.dumps(whole, default=str))
    there = _settings(folder)
    if there is not None:
        require_same(folder, "set of samples", there, wanted, advice="name a new folder")
        return
    write_durably(folder / "samples.json", json.dumps({"settings": wanted, "samples": []}, indent=1).encode())


@contextmanager
def _recording(
    store: TrajectoryStore | None,
    maker: Maker,
    batch: range,
    wanted: list[int],
    options: SampleOptions,
    policy: PrecisionPolicy,
) -> Iterator[Recorders | None]:
    """Recorders of each frame of each sample, finished when all went well; samples that only fill the batch are not
    kept. Raises StoreError when a recording is not whole."""
    if store is None:
        yield None
        return
    kept = replace(policy, storage=options.storage)
    keys: list[str] = []
    with ExitStack() as stack:

        def of_frame(frame: int) -> list[Recorder]:
            stack.close()  # which finishes those of the frame before
            made: dict[int, Recorder] = {}
            for number in wanted:
                key = f"{number:06d}" if maker.frames == 1 else f"{number:06d}-{frame:03d}"
                if key in store:  # of a call that was interrupted; the same seed makes the same steps again
                    store.remove(key)
                noted: dict[str, Any] = {
                    "seed": options.seed,
                    "sample": number,
                    "guidance": options.guidance_scale,
                    "scheduler": maker.sampler,
                    "steps": options.steps,
                    "label": _label(maker.facts(number)),
                    "noise_seed": own_seed(options.seed, number),
                    "noise_index": frame or None,
                }
                noted = {name: value for name, value in noted.items() if value is not None}
                form = TrajectoryFormat(storage=options.storage)
                recorder = StoreRecorder(store, key, format=form, model=str(options.ckpt), policy=str(kept), **noted)
                made[number] = stack.enter_context(recorder)
                keys.append(key)
            return [made.get(number, NullRecorder()) for number in batch]

        yield of_frame
    for key in keys:
        if not store[key].attributes["complete"]:
            problems = "; ".join(store[key].problems)
            raise StoreError(
                f"{store.root}/{key}: was not recorded whole ({problems}); the same command makes its sample again"
            )


def _label(facts: dict[str, Any]) -> str | None:
    """The classes that a sample is of, by name where they have one."""
    labels = facts.get("classes") or facts.get("labels")
    return " + ".join(map(str, labels)) if labels else None


def _require_finite(made: Made, batch: range, policy: PrecisionPolicy) -> None:
    bad = [n for n, latent in zip(batch, made.latents, strict=True) if not torch.isfinite(latent).all()]
    if bad:
        advice = "smaller steps" if policy.compute == "fp32" else "--precision fp32"
        raise NumericsError(f"sample {bad[0]} is not finite in {policy}; try {advice}")
