"""DatasetStore: many small latents, read at random."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

import fsspec
import numpy as np
import numpy.typing as npt
import pyarrow as pa

from halfstep.errors import InputError, StoreError
from halfstep.spec import LatentSpec
from halfstep.store.formats import LATENT_ARRAYS, Array, Float32, to_float32
from halfstep.store.index import INDEX_SCHEMA, READING_COLUMNS, read_table
from halfstep.store.manifest import NAME as MANIFEST_NAME
from halfstep.store.manifest import Manifest, parse_manifest
from halfstep.store.shard import ArrayLayout, MappedShard, RemoteShard, Shard

# Each mapped shard costs one file descriptor; 1024 is a usual limit for a process.
_OPEN_SHARDS = 256

# Parts that were listed can be gone when they are read, because another process merged them into a new one.
_ATTEMPTS = 5


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
            try:
                self._filesystem, self._root = fsspec.core.url_to_fs(self._location, use_listings_cache=False)
            except (ImportError, ValueError) as error:
                raise InputError(f"{self._location}: {error}") from error
        try:
            manifest = self._read_file(MANIFEST_NAME)
        except FileNotFoundError:
            raise StoreError(
                f"{self._location}: no store here (no {MANIFEST_NAME}); `halfstep encode -i SRC -o DIR` makes one"
            ) from None
        self.manifest: Manifest = parse_manifest(manifest, f"{self._location}/{MANIFEST_NAME}")
        table = self._read_index()
        # A later row of the same key supersedes an earlier one. Columns, not objects: a million rows must stay small.
        self._row_of: dict[str, int] = {key: row for row, key in enumerate(table["key"].to_pylist())}
        self._places = _columns(table)
        self._checksums = _column(table, "checksum")
        self._labels = table["label"].combine_chunks().dictionary_encode()
        self._items = int(self._places[list(self._row_of.values()), 2].sum())
        self._shards: OrderedDict[int, Shard] = OrderedDict()
        self._shift = None if set(self.spec.shift) == {0.0} else np.array(self.spec.shift, np.float32)
        self._scale = None if set(self.spec.scale) == {1.0} else np.array(self.spec.scale, np.float32)

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
        return self._items

    def __contains__(self, key: object) -> bool:
        return key in self._row_of

    def keys(self) -> list[str]:
        """All sequences, sorted."""
        return sorted(self._row_of)

    def length(self, key: str) -> int:
        """The number of frames of a sequence."""
        return self._place(key)[2]

    def label(self, key: str) -> str | None:
        """The class folder that the sequence came from, or None."""
        self._place(key)
        label: str | None = self._labels[self._row_of[key]].as_py()
        return label

    def labels(self) -> dict[str, str | None]:
        """`label` of all sequences at once."""
        by_row = self._labels.to_pylist()
        return {key: by_row[row] for key, row in self._row_of.items()}

    def latent_bytes(self) -> int:
        """Bytes of all latents (mean, variance, mirrored ones), without poses, index and headers."""
        return self._sum_of_latents(lambda layout: layout.row_bytes)

    def fp32_bytes(self) -> int:
        """What `latent_bytes` would be in fp32."""
        return self._sum_of_latents(lambda layout: 4 * layout.row_values)

    def _sum_of_latents(self, row: Callable[[ArrayLayout], int]) -> int:
        total = 0
        sizes: dict[int, int] = {}
        for key, place in self._row_of.items():
            number, _, length = self._places[place].tolist()
            if number not in sizes:
                layouts = self._located(key)[0].layouts
                sizes[number] = sum(row(layouts[name]) for name in LATENT_ARRAYS if name in layouts)
            total += sizes[number] * length
        return total

    def arrays(self, key: str) -> set[str]:
        """The names of the arrays stored for a sequence: `latents`, `frame`, and those asked for when encoding."""
        return set(self._located(key)[0].layouts) - {"index"}

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
        per_channel = (-1, *[1] * (latents.ndim - 2))
        if self._shift is not None:
            latents -= self._shift.reshape(per_channel)
        if self._scale is not None:
            latents *= self._scale.reshape(per_channel)
        return latents

    def read_array(self, key: str, name: str, start: int = 0, stop: int | None = None) -> Array:
        """Rows [start, stop) of another array of the sequence: `frame` (number in the source), `position` [n, 2]
        meters, `yaw` [n] radians, `logvar` (float32, of the unscaled latents)."""
        stored, type_name = self._rows(key, start, stop, name)
        return to_float32(stored, type_name) if type_name in ("F16", "BF16") else stored

    def posterior(
        self, key: str, start: int = 0, stop: int | None = None, *, mirror: bool = False
    ) -> tuple[Float32, Float32]:
        """Mean and standard deviation, model-ready, of frames whose store keeps moments. Draw `mean + std * noise`."""
        suffix = "_mirror" if mirror else ""
        mean = self.read(key, start, stop, name=f"latents{suffix}")
        std = np.exp(0.5 * self.read_array(key, f"logvar{suffix}", start, stop))
        return mean, std * np.array(self.spec.scale, np.float32).reshape(-1, *[1] * (std.ndim - 2))

    def __getstate__(self) -> dict[str, Any]:
        return {"location": self._location}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["location"])  # type: ignore[misc]

    def _rows(self, key: str, start: int, stop: int | None, name: str) -> tuple[Array, str]:
        shard, first, length = self._located(key)
        end = length if stop is None else stop
        if not 0 <= start <= end <= length:
            raise InputError(f"{key}: frames [{start}, {end}) asked for; the sequence has frames [0, {length})")
        layout = shard.layouts.get(name)
        if layout is None:
            have = ", ".join(sorted(set(shard.layouts) - {"index"}))
            raise InputError(f"{key}: no array {name!r} is stored for it; there are {have}")
        return shard.rows(name, first + start, first + end), layout.type_name

    def _located(self, key: str) -> tuple[Shard, int, int]:
        """The opened shard of a sequence, its first row there and its length."""
        try:
            number, first, length = self._place(key)
            return self._shard(number), first, length
        except FileNotFoundError:
            self._follow_moves()
        try:
            number, first, length = self._place(key)
            return self._shard(number), first, length
        except FileNotFoundError:
            raise StoreError(
                f"{key}: was dropped or replaced after {self._location} was opened; open it again"
            ) from None

    def _follow_moves(self) -> None:
        """Find the sequences of this snapshot again after another process has merged shards: same key, same bytes."""
        table = self._read_index()
        moved = {key: row for row, key in enumerate(table["key"].to_pylist())}
        places, checksums = _columns(table), _column(table, "checksum")
        for key, row in self._row_of.items():
            there = moved.get(key)
            if there is not None and checksums[there] == self._checksums[row]:
                self._places[row] = places[there]

    def _place(self, key: str) -> tuple[int, int, int]:
        row = self._row_of.get(key)
        if row is None:
            raise InputError(f"{self._location}: no sequence {key!r} (of {len(self._row_of)}); `.keys()` lists them")
        shard, start, length = self._places[row].tolist()
        return shard, start, length

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

    def _read_index(self) -> pa.Table:
        attempts = 0
        while True:
            try:
                parts = [self._read_part(part) for part in self._index_parts()]
            except FileNotFoundError:
                attempts += 1
                if attempts == _ATTEMPTS:
                    raise
            else:
                return pa.concat_tables(parts or [INDEX_SCHEMA.empty_table()])

    def _read_part(self, part: str) -> pa.Table:
        name = f"{self._root}/index/{part}"
        source = Path(name) if self._filesystem is None else self._filesystem.open(name, "rb")
        return read_table(source, f"{self._location}/index/{part}", READING_COLUMNS)

    def _index_parts(self) -> list[str]:
        if self._filesystem is None:
            names = [path.name for path in (Path(self._root) / "index").glob("[0-9]*.parquet")]
        else:
            listed = self._filesystem.ls(f"{self._root}/index", detail=False)
            names = [name.rsplit("/", 1)[-1] for name in listed if name.endswith(".parquet")]
        return sorted(names, key=lambda name: int(name.partition(".")[0]))

    def _read_file(self, name: str) -> bytes:
        if self._filesystem is None:
            return (Path(self._root) / name).read_bytes()
        data: bytes = self._filesystem.cat_file(f"{self._root}/{name}")
        return data


def _columns(table: pa.Table) -> npt.NDArray[np.int64]:
    """Shard, start and length of each row."""
    return np.stack([_column(table, name) for name in ("shard", "start", "length")], axis=1)


def _column(table: pa.Table, name: str) -> Array:
    """A column of whole numbers. Not by Arrow's own `to_numpy`, which loads pandas where that is installed: longer than
    it takes to open a store of 100,000 sequences."""
    return np.from_dlpack(table[name].combine_chunks())
