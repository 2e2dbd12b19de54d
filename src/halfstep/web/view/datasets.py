"""Dataset stores as pages ask for them: a screenful of sequences, one latent at a time."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from halfstep.errors import HalfstepError
from halfstep.files import file_errors
from halfstep.store import DatasetStore, Manifest, verify
from halfstep.store.manifest import NAME as MANIFEST_NAME
from halfstep.store.manifest import parse_manifest
from halfstep.web.view.decoding import Decoder
from halfstep.web.view.pictures import Array, Kept, distribution, grey, png
from halfstep.web.view.places import Shown, line_of, parse_json

_FAILURES = "failures.jsonl"  # of the newest run of `halfstep encode`
_MOST_FAILURES = 200  # that are told by name
_MOST_OPEN = 8
_POSES = ("position", "yaw")


@dataclass(frozen=True)
class Latent:
    """One latent of a store, model-ready [C, (T,) H, W], and what tells it from all others."""

    key: tuple[Any, ...]
    values: Array


@dataclass(frozen=True)
class Opened:
    """A store as it was when it was opened, and `token`, which is another one once it has changed."""

    path: Path
    token: tuple[Any, ...]
    store: DatasetStore

    @cached_property
    def keys(self) -> list[str]:
        return self.store.keys()

    @cached_property
    def searched(self) -> list[str]:
        """What a filter looks through, one for each of `keys`."""
        labels = self.store.labels()
        return [f"{key} {labels[key] or ''}".casefold() for key in self.keys]

    @cached_property
    def sizes(self) -> tuple[int, int]:
        """Bytes of all latents, and what they would be in fp32."""
        return self.store.latent_bytes(), self.store.fp32_bytes()


class Datasets:
    """The stores that are open. A store that was written to since is opened again."""

    def __init__(self, shown: Shown, decoder: Decoder) -> None:
        self._shown, self._decoder = shown, decoder
        self._opened: Kept[Opened] = Kept(_MOST_OPEN)

    def open(self, path: Path) -> Opened:
        """Raises StoreError when the store cannot be read, Refusal when a part of it lies outside of what is shown."""
        token = (path, *(_changed(path / name) for name in (MANIFEST_NAME, "index", "shards")))
        return self._opened.get(token, lambda: self._open(path, token))

    def _open(self, path: Path, token: tuple[Any, ...]) -> Opened:
        self._shown.require_inside(path, "index", "shards")
        with file_errors(path):
            return Opened(path, token, DatasetStore.open(path))

    def facts(self, path: Path) -> dict[str, Any]:
        """What the whole store has in common; what of it cannot be read is named in `problems`."""
        problems: list[str] = []
        facts: dict[str, Any] = {"manifest": None, "sequences": None, "items": None, "bytes": None, "fp32_bytes": None}
        self._shown.require_inside(path)
        try:
            facts["manifest"] = asdict(_manifest(path))
            opened = self.open(path)
            facts |= {"sequences": len(opened.keys), "items": len(opened.store)}
            facts["bytes"], facts["fp32_bytes"] = opened.sizes
        except (HalfstepError, OSError) as error:
            problems.append(line_of(error))
        failures, count = self._failures(path / _FAILURES, problems)
        unfinished = len(list((path / "staging").glob("[0-9]*"))) if (path / "staging").is_dir() else 0
        return {**facts, "failures": failures, "failed": count, "unfinished": unfinished, "problems": problems}

    def _failures(self, name: Path, problems: list[str]) -> tuple[list[dict[str, Any]], int]:
        """What the newest run of encode could not use: the first of it, and how many."""
        if not name.exists():
            return [], 0
        try:
            lines = self._shown.file(name).read_text(errors="replace").splitlines()
            found = [parse_json(line) for line in lines[:_MOST_FAILURES]]
        except (HalfstepError, OSError, ValueError) as error:
            problems.append(f"{_FAILURES}: cannot be read ({line_of(error)})")
            return [], 0
        return [failure for failure in found if isinstance(failure, dict)], len(lines)

    def sequences(self, path: Path, wanted: str, start: int, count: int) -> dict[str, Any]:
        """Those whose key or label has `wanted` in it, in the order of their keys, from number `start` on."""
        opened = self.open(path)
        store, keys, words = opened.store, opened.keys, wanted.casefold().split()
        if words:
            keys = [key for key, text in zip(keys, opened.searched, strict=True) if all(word in text for word in words)]
        rows = [{"key": key, "length": store.length(key), "label": store.label(key)} for key in keys[start:][:count]]
        return {"total": len(opened.keys), "matching": len(keys), "rows": rows}

    def sequence(self, path: Path, key: str) -> dict[str, Any]:
        """One sequence: its arrays and the shape of its latents."""
        store = self.open(path).store
        length = store.length(key)
        shape = list(store.read(key, 0, 1, raw=True).shape[1:]) if length else []
        return {
            "key": key,
            "length": length,
            "label": store.label(key),
            "arrays": sorted(store.arrays(key)),
            "shape": shape,
        }

    def decoding(self, path: Path) -> dict[str, str | None]:
        """Why latents of the store cannot be decoded, if they cannot. Slow the first time: it loads the autoencoder."""
        spec = self.open(path).store.spec
        return {"why_not": self._decoder.why_not(spec, spec.channels)}

    def frame(self, path: Path, key: str, number: int) -> dict[str, Any]:
        """How the values of a latent lie as they are stored, and what else is kept of its frame."""
        store = self.open(path).store
        stored = store.read(key, number, number + 1, raw=True)[0]
        beside = {}
        for name in sorted(store.arrays(key) & {"frame", *_POSES}):
            beside[name] = store.read_array(key, name, number, number + 1)[0].tolist()
        return {"beside": beside, **distribution(stored, store.manifest.storage)}

    def latent(self, path: Path, key: str, number: int) -> Latent:
        opened = self.open(path)
        return Latent((opened.token, key, number), opened.store.read(key, number, number + 1)[0])

    def picture(self, path: Path, key: str, number: int, t: int) -> bytes:
        """What a latent shows at its time `t`, as a PNG."""
        latent = self.latent(path, key, number)
        return self._decoder.picture(latent.key, latent.values, self.open(path).store.spec, t)

    def channel(self, path: Path, key: str, number: int, channel: int, t: int) -> bytes:
        """A channel of a latent, grey, as a PNG."""
        return grey_channel(self.latent(path, key, number).values, channel, t)

    def verify(self, path: Path) -> dict[str, Any]:
        """Every byte against its checksum."""
        self._shown.require_inside(path, "index", "shards")
        report = verify(path)
        return {
            "ok": report.ok,
            "line": f"{report.items} items in {report.shards} shards",
            "problems": [line.removeprefix(f"{path}/") for line in report.problems],
        }


def grey_channel(latent: Array, channel: int, t: int) -> bytes:
    """A channel of a latent [C, (T,) H, W] as a PNG."""
    values = latent[min(channel, len(latent) - 1)]
    if values.ndim == 3:
        values = values[min(t, len(values) - 1)]
    return png(grey(values if values.ndim == 2 else values.reshape(1, -1)))


def _manifest(path: Path) -> Manifest:
    name = path / MANIFEST_NAME
    with file_errors(name):
        return parse_manifest(name.read_bytes(), str(name))


def _changed(path: Path) -> tuple[int, int]:
    """What is another value once a file, or the list of names in a folder, has changed."""
    try:
        found = path.stat()
    except FileNotFoundError:
        return 0, 0
    return found.st_ino, found.st_mtime_ns
