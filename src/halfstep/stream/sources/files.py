"""Events from files: HDF5 and CXI, arrays, pictures, videos. They are numbered, so a run goes on where it stopped."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import h5py
import hdf5plugin  # noqa: F401 - lets HDF5 read what detectors compress
import numpy as np

from halfstep.data.base import SourceError
from halfstep.data.keys import name_to_key
from halfstep.data.pictures import opened
from halfstep.data.videos import EXTENSIONS as VIDEOS
from halfstep.data.videos import VideoSequence
from halfstep.errors import InputError
from halfstep.spec import PixelSpec
from halfstep.stream.events import Array, Event, Fact, Identity, Message, MessageError
from halfstep.stream.sources.base import Incoming, Source

HDF5 = frozenset({".h5", ".hdf5", ".cxi", ".nxs"})
PICTURES = frozenset({".png", ".tif", ".tiff", ".jpg", ".jpeg", ".bmp", ".webp"})

_DATA = ("entry_1/data_1/data", "entry_1/instrument_1/detector_1/data", "entry/data/data", "data/data", "data")
_FACTS = {
    "timestamp": ("LCLS/timestamp", "LCLS/machineTime", "data/timestamp", "timestamp"),
    "photon_energy_eV": ("LCLS/photon_energy_eV",),
}

Loader = Callable[[], tuple[Array, dict[str, Fact]]]  # data [C, H, W] and facts of one event


class FilesSource(Source):
    """The events in `paths`, files or folders, in the order of their names. `data` is where HDF5 files keep images
    [n, H, W] or [n, C, H, W]; None looks in the usual places. With three `channels` pictures and the frames of videos,
    which are fitted to `size` (height, width), keep their colors; with one they are gray. Raises InputError when there
    is nothing to read."""

    guarantee = "numbered"

    def __init__(
        self, paths: Sequence[Path], *, data: str | None = None, channels: int = 1, size: tuple[int, int] | None = None
    ) -> None:
        self._data, self._channels, self._size = data, channels, size
        files = [file for path in paths for file in _listed(path)]
        if not files:
            raise InputError(
                f"{', '.join(map(str, paths))}: nothing to read; expected HDF5, CXI, .npy, pictures, videos"
            )
        if size is None and any(file.suffix.lower() in VIDEOS for file in files):
            raise InputError("data.shape: is not given; frames of videos are fitted to it")
        self._loaders = self._all(files)
        self._next = next(self._loaders, None)
        self.exhausted = self._next is None

    def receive(self, timeout_s: float) -> Incoming | None:
        if self._next is None:
            return None
        identity, load = self._next
        self._next = next(self._loaders, None)
        self.exhausted = self._next is None

        def message() -> Message:
            try:
                data, facts = load()
            except (SourceError, OSError, ValueError, KeyError, RuntimeError, EOFError, TypeError) as error:
                raise MessageError(f"{identity.source}: event {identity.sequence}: {error}") from error
            return Message((Event(identity, data, facts),), identity.run, identity.source)

        return Incoming(0, message, b"", identity.source)

    def events(self) -> Iterator[Event]:
        """All of them, one after the other, to be sent elsewhere. Raises MessageError at one that cannot be read."""
        while (incoming := self.receive(0)) is not None:
            yield from incoming.load().events

    def _all(self, files: Sequence[Path]) -> Iterator[tuple[Identity, Loader]]:
        for file in files:
            source = name_to_key(str(file.resolve()))
            for number, load in self._in_file(file):
                yield Identity("files", source, str(number), number), load

    def _in_file(self, file: Path) -> Iterator[tuple[int, Loader]]:
        suffix = file.suffix.lower()
        if suffix in HDF5:
            yield from enumerate(self._hdf5(file))
        elif suffix == ".npy":
            yield 0, partial(_array, file)
        elif suffix in VIDEOS:
            assert self._size is not None
            sequence = VideoSequence("video", None, file, PixelSpec(self._size[1], self._size[0]))
            for number, load in sequence.frames(()):
                yield number, partial(self._frame, load)
        else:
            yield 0, partial(self._picture, file)

    def _hdf5(self, file: Path) -> Iterator[Loader]:
        try:
            with h5py.File(file) as opened_file:
                names = [self._data] if self._data else _DATA
                found = next((name for name in names if isinstance(opened_file.get(name), h5py.Dataset)), None)
                shape: tuple[int, ...] = opened_file[found].shape if found is not None else ()
                there: list[str] = []
                opened_file.visit(there.append)
        except (OSError, RuntimeError) as error:
            raise InputError(f"{file}: cannot be read as HDF5 ({error})") from error
        if found is None or len(shape) not in (3, 4):
            expected = self._data or " or ".join(_DATA)
            raise InputError(f"{file}: has no images [n, H, W] or [n, C, H, W] at {expected}; it has {there[:20]}")
        for row in range(shape[0]):
            yield partial(_row, file, found, row)

    def _frame(self, load: Callable[[], Array]) -> tuple[Array, dict[str, Fact]]:
        return self._colored(load()), {}

    def _picture(self, file: Path) -> tuple[Array, dict[str, Fact]]:
        with opened(file) as image:
            deep = image.mode in ("I", "F", "L") or image.mode.startswith("I;16")
            return self._colored(np.asarray(image if deep else image.convert("RGB"))), {}

    def _colored(self, pixels: Array) -> Array:
        """[H, W] or [H, W, 3] as [C, H, W]; gray is the mean of the colors."""
        if pixels.ndim == 2:
            return np.repeat(pixels[None], self._channels, axis=0)
        if self._channels == 1:
            gray: Array = pixels.mean(axis=2, dtype=np.float32)[None]
            return gray
        return np.ascontiguousarray(pixels.transpose(2, 0, 1))


def _listed(path: Path) -> list[Path]:
    known = HDF5 | PICTURES | VIDEOS | {".npy"}
    if path.is_dir():
        return sorted(file for file in path.rglob("*") if file.suffix.lower() in known and file.is_file())
    if not path.exists():
        raise InputError(f"{path}: no such file or folder")
    if path.suffix.lower() not in known:
        raise InputError(f"{path}: is of no kind that is read; expected one of {', '.join(sorted(known))}")
    return [path]


def _row(file: Path, dataset: str, row: int) -> tuple[Array, dict[str, Fact]]:
    with h5py.File(file) as opened_file:
        images = opened_file[dataset]
        data: Any = images[row]
        facts: dict[str, Fact] = {}
        for name, places in _FACTS.items():
            for place in places:
                values: Any = opened_file.get(place)
                if isinstance(values, h5py.Dataset) and values.shape == (len(images),) and values.dtype.kind in "uif":
                    facts[name] = values[row].item()
                    break
    return data[None] if data.ndim == 2 else data, facts


def _array(file: Path) -> tuple[Array, dict[str, Fact]]:
    data = np.load(file, allow_pickle=False)
    if data.ndim not in (2, 3):
        raise ValueError(f"got shape {list(data.shape)}; expected [H, W] or [C, H, W]")
    return data[None] if data.ndim == 2 else data, {}
