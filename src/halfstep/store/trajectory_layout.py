"""How a trajectory store lies on disk: formats of latents, names, and writes that survive a crash."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self, TypeVar, cast

import google_crc32c
from numcodecs import Blosc
from upath import UPath
from zarr.abc.store import Store
from zarr.codecs import BloscCodec, BytesCodec, Crc32cCodec
from zarr.core.buffer import Buffer
from zarr.storage import FsspecStore, LocalStore

from halfstep.errors import InputError
from halfstep.files import fsync_path, write_durably
from halfstep.store.predictive import GROUP, Fidelity, Float32, Noise, Promise, encode_trajectory
from halfstep.store.zarr_codec import PredictiveCodec

FORMAT_VERSION = 1
CHECKSUM = "crc32c"  # the attribute of a run that is the checksum of the others, as JSON with sorted names
LABELS = {"steps": "<i8", "timesteps": "<f8", "sigmas": "<f8"}
LABEL_CHUNK = 64
STATES_A_CHUNK = 4 * GROUP  # of the predictive codec, whose groups refer to those before within a chunk
RUN_PATTERN = "[!.]*/latents/zarr.json"  # what every run with a step has

KEY = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_BLOSC = Blosc(cname="zstd", clevel=1, shuffle=Blosc.SHUFFLE)
_CODECS = ("predictive", "blosc", "raw")


@dataclass(frozen=True)
class TrajectoryFormat:
    """How a run's latents are kept.

    codec: `predictive` (an eleventh of fp32's bytes at fp16's error), or what any Zarr reader opens without halfstep:
        `blosc` (shuffle and zstd) and `raw`.
    storage: predictive keeps the error at that of casting to this type, fp32 meaning exactly; the others cast to it.
        bf16 is for predictive only, Zarr does not have it.
    max_error: for predictive, the largest error of a value instead.
    strict: for predictive, no channel of a state is further off than casting would have it, instead of 1.5 times.
    channel_axis: for predictive, the axis of a step that its channels lie on; by default the first, and the second of
        steps of two axes, which are packed [tokens, channels].
    """

    codec: str = "predictive"
    storage: str = "fp16"
    max_error: float | None = None
    strict: bool = False
    channel_axis: int | None = None

    def __post_init__(self) -> None:
        allowed = ("fp16", "bf16", "fp32") if self.codec == "predictive" else ("fp16", "fp32")
        if self.codec not in _CODECS:
            raise InputError(f"codec: got {self.codec!r}; expected one of {', '.join(_CODECS)}")
        if self.storage not in allowed:
            raise InputError(f"storage: got {self.storage!r}; expected one of {', '.join(allowed)} with {self.codec}")
        for name, value, kinds in (
            ("max_error", self.max_error, (int, float)),
            ("channel_axis", self.channel_axis, int),
        ):
            if value is not None and (not isinstance(value, kinds) or isinstance(value, bool)):
                raise InputError(f"{name}: got {value!r}; expected a number")
        if self.max_error is not None and self.codec != "predictive":
            raise InputError(f"max_error: {self.codec} keeps what it is given; use the predictive codec")
        if self.strict and (self.codec != "predictive" or self.max_error is not None or self.storage == "fp32"):
            raise InputError("strict: is for the predictive codec at the error of fp16 or bf16")
        Promise(self.max_error)

    def __str__(self) -> str:
        if self.max_error is not None:
            return f"{self.codec}, error up to {self.max_error:g}"
        return f"{self.codec}, {self.storage}{', strict' if self.strict else ''}"

    @property
    def is_exact(self) -> bool:
        """Whether every value comes back as it was."""
        return self.storage == "fp32" if self.max_error is None else self.max_error == 0

    def of_steps(self, shape: tuple[int, ...]) -> Self:
        """The same for steps of one shape, whose channels have a place. Raises InputError when they have no such
        axis."""
        if self.channel_axis is None:
            return replace(self, channel_axis=int(len(shape) == 2))
        if not -len(shape) <= self.channel_axis < len(shape):
            raise InputError(f"channel_axis: got {self.channel_axis}; the steps have {len(shape)} axes")
        return self

    @property
    def _promise(self) -> Promise:
        fidelity = None if self.storage == "fp32" else cast(Fidelity, self.storage)
        return Promise(self.max_error, fidelity, self.strict)

    @property
    def group(self) -> int:
        """Steps that are encoded together."""
        return GROUP if self.codec == "predictive" else 1

    @property
    def states_a_chunk(self) -> int:
        return STATES_A_CHUNK if self.codec == "predictive" else 1

    @classmethod
    def of(cls, array: Any) -> Self:
        """The format of the `latents` array of a run."""
        codecs = array.metadata.codecs
        if isinstance(codecs[0], PredictiveCodec):
            own = codecs[0]
            return cls("predictive", own.fidelity or "fp32", own.max_error, own.strict, own.channel_axis)
        codec = "blosc" if any(isinstance(codec, BloscCodec) for codec in codecs) else "raw"
        return cls(codec, {"float16": "fp16", "float32": "fp32"}[str(array.dtype)])

    def encode_chunk(self, latents: Float32, before: bytes = b"", noise: Noise | None = None) -> bytes:
        """The bytes of one chunk of the array, as zarr's own pipeline makes them, without its cost in Python: at most
        `group` steps, behind those of the chunk `before`. `noise`: what the first may be."""
        if self.codec == "predictive":
            axis = self.channel_axis or 0
            return encode_trajectory(
                latents, self._promise, group=self.group, channel_axis=axis, after=before, noise=noise
            )
        stored = latents.astype("<f2" if self.storage == "fp16" else "<f4")
        return with_crc32c(_BLOSC.encode(stored) if self.codec == "blosc" else stored.tobytes())

    def array_options(self) -> dict[str, Any]:
        """The arguments of zarr's `create_array` that make latents of this format."""
        if self.codec == "predictive":
            promise = self._promise
            axis = self.channel_axis or 0
            serializer = PredictiveCodec(promise.max_error, promise.fidelity, promise.strict, axis)
            return {"dtype": "float32", "serializer": serializer, "compressors": None, "filters": None}
        blosc = [BloscCodec(cname="zstd", clevel=1, shuffle="shuffle")] if self.codec == "blosc" else []
        dtype = {"fp16": "float16", "fp32": "float32"}[self.storage]
        return {"dtype": dtype, "serializer": BytesCodec(), "compressors": [*blosc, Crc32cCodec()], "filters": None}


def with_crc32c(data: bytes) -> bytes:
    """`data` and its CRC-32C, as zarr's codec of that name has it."""
    checksum: int = google_crc32c.value(data)
    return data + checksum.to_bytes(4, "little")


def sealed(attributes: Mapping[str, Any]) -> dict[str, Any]:
    """The attributes of a run with their checksum."""
    plain = {name: value for name, value in attributes.items() if name != CHECKSUM}
    return {**plain, CHECKSUM: google_crc32c.value(json.dumps(plain, sort_keys=True).encode())}


class DurableStore(LocalStore):
    """zarr's local store, whose writes survive a crash once they return."""

    async def set(self, key: str, value: Buffer) -> None:
        self._check_writable()
        await asyncio.to_thread(_write_with_folders, self.root / key, value.to_bytes())


def _write_with_folders(path: Path, data: bytes) -> None:
    missing = [folder for folder in path.parents if not folder.exists()]
    path.parent.mkdir(parents=True, exist_ok=True)
    write_durably(path, data)
    for folder in missing:
        fsync_path(folder.parent)


def check_key(key: str) -> None:
    """Raise InputError unless `key` can name a run."""
    if not KEY.fullmatch(key):
        raise InputError(
            f"run {key!r}: a name is 1 to 128 letters, digits, '.', '_' or '-', and begins with a letter or digit"
        )


def readable(root: Path | UPath) -> Store:
    """zarr's store for reading at a folder or behind a URL."""
    if isinstance(root, Path):
        return LocalStore(root, read_only=True)
    return FsspecStore.from_url(str(root), storage_options=dict(root.storage_options), read_only=True)


Folder = TypeVar("Folder", Path, UPath, Path | UPath)


def chunk_path(folder: Folder, number: int, dimensions: int) -> Folder:
    """The file of chunk `number` of the latents in run folder `folder`."""
    return folder / "latents" / ".".join(["c", str(number), *["0"] * (dimensions - 1)])
