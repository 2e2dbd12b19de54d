"""DatasetStore: many small latents, read at random."""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

import fsspec
import numpy as np

from halfstep.errors import InputError, StoreError
from halfstep.spec import LatentSpec
from halfstep.store.formats import LATENT_ARRAYS, Array, Float32, to_float32
from halfstep.store.index import READING_COLUMNS, read_table
from halfstep.store.manifest import NAME as MANIFEST_NAME
from halfstep.store.manifest import Manifest, parse_manifest
from halfstep.store.shard import MappedShard, RemoteShard, Shard

# Each mapped shard costs one file descriptor; 1024 is a usual limit for a process.
_OPEN_SHARDS = 256


class DatasetStore:
    """A store opened for reading: `DatasetStore.open("latents")` or any fsspec URL, `s3://bucket/latents`.

    Sequences are found by key; each holds the latents of its frames (a picture is a sequence of one frame). Local reads
    go through memory maps, remote reads are ranged requests. An opened store is a snapshot of what was committed then;
    it can be pickled to worker processes, which open it again.
    """

    def __init__(self, location: str | Path) -> None:
        self._location = str(location)
        remote = "://" in self._location
        self._filesystem: Any = None
        self._root = self._location
        if remote:
            self._filesystem, self._root = fsspec.core.url_to_fs(self._location)
        try:
            manifest = self._read_file(MANIFEST_NAME)
            parts = self._index_parts()
        except FileNotFoundError:
            raise StoreError(
                f"{self._location}: no store here (no {MANIFEST_NAME}); `halfstep encode -i SRC -o DIR` makes one"
            ) from None
        self.manifest: Manifest = parse_manifest(manifest, f"{self._location}/{MANIFEST_NAME}")
        self._keys: dict[str, int] = {}
        self._labels: list[str | None] = []
        self._places: list[tuple[int, int, int]] = []  # shard, start, length
        for part in parts:
            self._add_part(part)
        self._shards: OrderedDict[int, Shard] = OrderedDict()
        shift, scale = self.spec.shift, self.spec.scale
        self._affine = (
            None
            if set(shift) == {0.0} and set(scale) == {1.0}
            else (np.array(shift, np.float32), np.array(scale, np.float32))
        )

    @classmethod
    def open(cls, location: str | Path) -> Self:
        """Open the store at a folder or fsspec URL. Raises StoreError when there is none or it is damaged."""
        return cls(location)

    @property
    def spec(self) -> LatentSpec:
        """What the latents are, and the scale and shift that make them model-ready."""
        return self.manifest.spec

    @property
    def location(self) -> str:
        return self._location

    def __len__(self) -> int:
        """The number of items: frames, over all sequences (clips, for a video autoencoder)."""
        return sum(self._places[row][2] for row in self._keys.values())

    def __contains__(self, key: object) -> bool:
        return key in self._keys

    def keys(self) -> list[str]:
        """All sequences, sorted."""
        return sorted(self._keys)

    def frames(self, key: str) -> int:
        """The number of frames of a sequence."""
        return self._place(key)[2]

    def label(self, key: str) -> str | None:
        """The class folder that the sequence came from, or None."""
        self._place(key)
        return self._labels[self._keys[key]]

    def latent_bytes(self) -> int:
        """Bytes of all latents (mean, variance, mirrored ones), without poses, index and headers."""
        total = 0
        sizes: dict[int, int] = {}
        for row in self._keys.values():
            number, _, length = self._places[row]
            if number not in sizes:
                layouts = self._shard(number).layouts
                sizes[number] = sum(layouts[name].row_bytes for name in LATENT_ARRAYS if name in layouts)
            total += sizes[number] * length
        return total

    def arrays(self, key: str) -> set[str]:
        """The names of the arrays stored for a sequence: `latents`, `frame`, and those asked for when encoding."""
        return set(self._shard(self._place(key)[0]).layouts) - {"index"}

    def read(
        self, key: str, start: int = 0, stop: int | None = None, *, raw: bool = False, name: str = "latents"
    ) -> Array:
        """Latents of frames [start, stop) as float32 [n, C, (T,) H, W], model-ready: `(stored - shift) * scale`.

        With `raw=True`: as stored, unscaled; fp16 and fp32 stores give their own type without a copy, bf16, which numpy
        does not have, is widened to the float32 of equal value. `name` chooses `latents_mirror` instead. Raises
        InputError for an unknown key or frames outside the sequence.
        """
        stored, type_name = self._rows(key, start, stop, name)
        if raw:
            return to_float32(stored, type_name) if type_name == "BF16" else stored
        latents = to_float32(stored, type_name)
        if self._affine is not None:
            shift, scale = (values.reshape(-1, *[1] * (latents.ndim - 2)) for values in self._affine)
            latents -= shift
            latents *= scale
        return latents

    def read_array(self, key: str, name: str, start: int = 0, stop: int | None = None) -> Array:
        """Rows [start, stop) of another array of the sequence: `frame` (number in the source), `position` [n, 2]
        metres, `yaw` [n] radians, `logvar` (float32, of the unscaled latents)."""
        stored, type_name = self._rows(key, start, stop, name)
        return to_float32(stored, type_name) if type_name in ("F16", "BF16") else stored

    def stored_rows(self, key: str, name: str, start: int = 0, stop: int | None = None) -> Array:
        """Rows [start, stop) of any array exactly as they lie in the shard (bf16 as its bits in uint16)."""
        return self._rows(key, start, stop, name)[0]

    def posterior(self, key: str, start: int = 0, stop: int | None = None) -> tuple[Float32, Float32]:
        """Mean and standard deviation, model-ready, of frames whose store keeps moments. Draw `mean + std * noise`."""
        mean = self.read(key, start, stop)
        std = np.exp(0.5 * self.read_array(key, "logvar", start, stop))
        return mean, std * np.array(self.spec.scale, np.float32).reshape(-1, *[1] * (std.ndim - 2))

    def __getstate__(self) -> dict[str, Any]:
        return {"location": self._location}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["location"])  # type: ignore[misc]

    def _rows(self, key: str, start: int, stop: int | None, name: str) -> tuple[Array, str]:
        number, first, length = self._place(key)
        end = length if stop is None else stop
        if not 0 <= start <= end <= length:
            raise InputError(f"{key}: frames [{start}, {end}) asked for; the sequence has frames [0, {length})")
        shard = self._shard(number)
        layout = shard.layouts.get(name)
        if layout is None:
            have = ", ".join(sorted(set(shard.layouts) - {"index"}))
            raise InputError(f"{key}: no array {name!r} is stored for it; there are {have}")
        return shard.rows(name, first + start, first + end), layout.type_name

    def _place(self, key: str) -> tuple[int, int, int]:
        row = self._keys.get(key)
        if row is None:
            raise InputError(f"{self._location}: no sequence {key!r} (of {len(self._keys)}); `.keys()` lists them")
        return self._places[row]

    def _shard(self, number: int) -> Shard:
        shard = self._shards.get(number)
        if shard is None:
            name = f"{number:05d}.safetensors"
            if self._filesystem is not None:
                shard = RemoteShard(self._filesystem, f"{self._root}/shards/{name}")
            else:
                shard = MappedShard(Path(self._root) / "shards" / name)
            self._shards[number] = shard
            if len(self._shards) > _OPEN_SHARDS:
                self._shards.popitem(last=False)
        return shard

    def _add_part(self, part: str) -> None:
        where = f"{self._location}/index/{part}"
        source = self._open_file(f"index/{part}") if self._filesystem else f"{self._root}/index/{part}"
        table = read_table(source, where, READING_COLUMNS)
        columns = [table.column(name).to_pylist() for name in READING_COLUMNS]
        for key, shard, start, length, label in zip(*columns, strict=True):
            self._keys[key] = len(self._places)  # a later shard supersedes an earlier one
            self._labels.append(label)
            self._places.append((shard, start, length))

    def _index_parts(self) -> list[str]:
        if self._filesystem is None:
            return sorted(path.name for path in (Path(self._root) / "index").glob("[0-9]*.parquet"))
        listed = self._filesystem.ls(f"{self._root}/index", detail=False)
        return sorted(name.rsplit("/", 1)[-1] for name in listed if name.endswith(".parquet"))

    def _read_file(self, name: str) -> bytes:
        if self._filesystem is None:
            return (Path(self._root) / name).read_bytes()
        data: bytes = self._filesystem.cat_file(f"{self._root}/{name}")
        return data

    def _open_file(self, name: str) -> Any:
        return self._filesystem.open(f"{self._root}/{name}", "rb")

    def attributes(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """Key and attributes of every sequence, read from the index as asked."""
        found: dict[str, dict[str, Any]] = {}
        for part in self._index_parts():
            source = self._open_file(f"index/{part}") if self._filesystem else f"{self._root}/index/{part}"
            table = read_table(source, part, ["key", "attributes"])
            found.update((r["key"], json.loads(r["attributes"])) for r in table.to_pylist())
        return iter(sorted(found.items()))
