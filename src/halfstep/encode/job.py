"""What is to be encoded and how, settled before the first picture is read."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import get_args

import torch

from halfstep.autoencoders import Autoencoder, load_autoencoder
from halfstep.data.base import FrameSequence, digest
from halfstep.data.guarded import Guarded
from halfstep.data.listing import Kind
from halfstep.data.pt_tree import imported_spec
from halfstep.data.sources import Source
from halfstep.encode.clips import LastClip
from halfstep.errors import InputError
from halfstep.precision import PrecisionPolicy, Settled, Trial, network_trial, probe
from halfstep.precision import settle as settle_precision
from halfstep.spec import Crop, LatentSpec, PixelSpec
from halfstep.store.manifest import Manifest

# Above this many pixels on a side the library encodes in tiles: one 1024 x 1024 picture takes an SD-sized encoder 5 GB.
_TILE_ABOVE = 1024


@dataclass(frozen=True)
class EncodeOptions:
    """What the user asked for. `size` is (width, height). None leaves the choice: to what the store was made with, or
    for a new one to the default or the measurement."""

    output: Path
    autoencoder: str | None = None
    revision: str | None = None
    precision: str = "auto"
    storage: str | None = None
    size: tuple[int, int] | None = None
    clip_length: int | None = None
    last_clip: LastClip | None = None
    moments: bool = False
    mirror: bool = False
    batch_size: int | None = None
    workers: int | None = None
    limit: int | None = None
    strict: bool = False
    keep_missing: bool = False
    device: str = "auto"


@dataclass(frozen=True)
class EncodeJob:
    """A settled run: the same on every process that shares it. `recipe` is the digest of all that, besides the source's
    bytes, decides what a latent is; it is part of every fingerprint."""

    output: Path
    spec: LatentSpec
    policy: PrecisionPolicy
    autoencoder: str
    revision: str | None
    tiled: bool
    moments: bool
    mirror: bool
    batch_size: int
    workers: int
    strict: bool
    device: str
    channels_last: bool
    notes: tuple[str, ...] = ()  # what the user should know of the precision
    last_clip: LastClip = "drop"

    @property
    def storage(self) -> str:
        return self.policy.storage

    @property
    def recipe(self) -> bytes:
        spec = replace(self.spec, autoencoder="", revision="")
        settings = [asdict(spec), str(self.policy), self.tiled, self.moments, self.mirror]
        if self.last_clip != "drop":
            settings.append(self.last_clip)
        return digest(json.dumps(settings).encode())

    @property
    def manifest(self) -> Manifest:
        from halfstep import __version__

        recipe = {
            "policy": str(self.policy),
            "batch_size": self.batch_size,
            "channels_last": self.channels_last,
            "tiled": self.tiled,
            "moments": self.moments,
            "mirror": self.mirror,
        }
        if self.last_clip != "drop":
            recipe["last_clip"] = self.last_clip
        return Manifest(
            self.spec, self.storage, str(self.policy), recipe=recipe, created_with=f"halfstep {__version__}"
        )

    @property
    def imports_latents(self) -> bool:
        """The sources hold latents already; they are repacked, not encoded."""
        return self.spec.pixels is None

    def load_autoencoder(self) -> Autoencoder:
        return load_autoencoder(self.autoencoder, self.revision, tiled=self.tiled)


def settle(
    options: EncodeOptions, sources: list[Source], existing: Manifest | None, device: str, workers: int
) -> tuple[EncodeJob, Autoencoder | None]:
    """Resolve the spec, the policy and everything "auto" but the batch size (0 until it is measured).

    What a store was made with is kept where the user leaves the choice: rerunning on another machine must not encode
    everything anew because another type is faster there. Raises InputError when the options do not fit together.
    """
    kinds = {source.kind for source in sources}
    asked = PrecisionPolicy.parse(options.precision)
    if options.storage is not None:
        asked = replace(asked, storage=options.storage)
    recipe = existing.recipe if existing else {}
    last_clip = options.last_clip or recipe.get("last_clip", "drop")
    if last_clip not in get_args(LastClip):
        raise InputError(f"--last-clip: got {last_clip!r}; expected {', '.join(get_args(LastClip))}")
    identifier = options.autoencoder or (existing.spec.autoencoder if existing else "dct8")
    autoencoder, tiled, channels_last = None, False, False
    if "latents" in kinds:
        _require_plain_import(options, kinds)
        kept = existing.storage if existing and asked.is_auto else "fp16"
        settled = Settled(PrecisionPolicy(storage=kept if asked.storage == "auto" else asked.storage))
        spec = imported_spec(sources[0].latent_shape())
    else:
        pixels = _pixels(options, kinds, existing)
        tiled = max(pixels.width, pixels.height) > _TILE_ABOVE
        autoencoder = load_autoencoder(identifier, options.revision, tiled=tiled)
        spec = replace(autoencoder.spec, pixels=_fit_to(autoencoder.spec, pixels, options, kinds, existing))
        settled = settle_precision(
            asked, device, "encode", existing.policy if existing else None, lambda: _trial(autoencoder, spec, device)
        )
        if options.moments and not autoencoder.variational:
            raise InputError(f"--moments: {identifier} has no variance; leave it out, or use a variational autoencoder")
        # Another memory format rounds differently, so one process decides for all and a store keeps it.
        measured = probe(device).types[settled.policy.compute].prefers_channels_last
        channels_last = recipe.get("channels_last", measured)
    job = EncodeJob(
        output=options.output,
        spec=spec,
        policy=settled.policy,
        autoencoder=identifier,
        revision=options.revision,
        tiled=tiled,
        moments=options.moments,
        mirror=options.mirror,
        batch_size=options.batch_size or recipe.get("batch_size", 0),
        workers=workers,
        strict=options.strict,
        device=device,
        channels_last=channels_last,
        notes=settled.notes,
        last_clip=last_clip,
    )
    return job, autoencoder


def _trial(autoencoder: Autoencoder, spec: LatentSpec, device: str) -> Trial | None:
    """Of one picture or clip; larger batches are hardly faster."""
    assert spec.pixels is not None
    time = () if spec.temporal_factor == 1 else (spec.pixels.clip_length,)
    pixels = torch.empty(1, 3, *time, spec.pixels.height, spec.pixels.width)
    return network_trial(autoencoder.encoder, (pixels,), 1, torch.device(device), lane=True)


def _require_plain_import(options: EncodeOptions, kinds: set[Kind]) -> None:
    """Raise InputError when options ask for more of ready latents than to be repacked."""
    given = {
        "--moments": options.moments,
        "--mirror": options.mirror,
        "--size": options.size is not None,
        "--autoencoder": options.autoencoder is not None,
        "--clip-length": options.clip_length is not None,
        "--last-clip": options.last_clip is not None,
        "other kinds of sources": kinds != {"latents"},
    }
    if surplus := [name for name, there in given.items() if there]:
        raise InputError(f"latents are repacked as they are, without {' and '.join(surplus)}; leave that out")


def list_sequences(sources: list[Source], spec: LatentSpec, limit: int | None) -> list[FrameSequence]:
    """All sequences of all sources in a fixed order, what cannot be used of a source after the rest of it; with
    `limit`, only the first ones that together reach it. Raises InputError where two have one key."""
    pixels = spec.pixels or PixelSpec(0, 0)
    shape = spec.latent_shape
    sequences: list[FrameSequence] = []
    for source in sources:
        sequences += [Guarded(sequence) for sequence in source.sequences(pixels, shape)]
        sequences += source.lost
    _refuse_shared_keys(sequences)
    if limit is None:
        return sequences
    total = 0
    for count, sequence in enumerate(sequences):
        if total >= limit:
            return sequences[:count]
        total += max(1, sequence.expected)
    return sequences


def _refuse_shared_keys(sequences: list[FrameSequence]) -> None:
    """The later one would take the place of the other in the store, in every run again."""
    times = Counter(sequence.key for sequence in sequences)
    if len(times) == len(sequences):
        return
    shared = next(key for key, count in times.items() if count > 1)
    first, second, *_ = [sequence.source for sequence in sequences if sequence.key == shared]
    raise InputError(f"sources: {first} and {second} would both be {shared!r} in the store; give another `name`")


def _pixels(options: EncodeOptions, kinds: set[Kind], existing: Manifest | None) -> PixelSpec:
    if "walks" in kinds and len(kinds) > 1:
        raise InputError(
            f"sources: {' and '.join(sorted(kinds))} are cropped differently, so they cannot share a store; "
            "encode each kind into a store of its own"
        )
    crop: Crop = "4:3" if "walks" in kinds else "fill"
    made_with = existing.spec.pixels if existing else None
    default = (224, 224) if crop == "4:3" else (256, 256)
    width, height = options.size or ((made_with.width, made_with.height) if made_with else default)
    return PixelSpec(width, height, crop)


def _fit_to(
    spec: LatentSpec, pixels: PixelSpec, options: EncodeOptions, kinds: set[Kind], existing: Manifest | None
) -> PixelSpec:
    factor, over_time = spec.spatial_factor, spec.temporal_factor
    if pixels.width % factor or pixels.height % factor or min(pixels.width, pixels.height) < factor:
        raise InputError(f"--size: got {pixels.width}x{pixels.height}; {spec.autoencoder} needs multiples of {factor}")
    if over_time == 1:
        if options.clip_length is not None:
            raise InputError(f"--clip-length: {spec.autoencoder} encodes single frames; clips are cut when training")
        if options.last_clip is not None:
            raise InputError(f"--last-clip: {spec.autoencoder} encodes single frames; clips are cut when training")
        return pixels
    if "walks" in kinds:
        raise InputError(f"{spec.autoencoder} compresses time, but each frame of a walk has its own pose")
    if len(kinds) > 1:
        raise InputError(
            f"{spec.autoencoder} makes clips of videos and single frames of pictures; use a store for each"
        )
    made_with = existing.spec.pixels if existing else None
    default = 1 if kinds == {"pictures"} else 4 * over_time + 1
    clip_length = options.clip_length or (made_with.clip_length if made_with else default)
    if (clip_length - 1) % over_time:
        raise InputError(
            f"--clip-length: got {clip_length}; {spec.autoencoder} needs one more than a multiple of {over_time}"
        )
    return replace(pixels, clip_length=clip_length)
