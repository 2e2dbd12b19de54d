"""Recorded sampling runs as pages ask for them: a list from what was noted of each, one state at a time."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from halfstep.errors import HalfstepError, InputError, StoreError
from halfstep.files import file_errors
from halfstep.spec import LatentSpec
from halfstep.store import Run, TrajectoryStore, open_trajectories, verify_trajectories
from halfstep.store.manifest import NAME as MANIFEST_NAME
from halfstep.store.manifest import parse_manifest
from halfstep.web.view.datasets import grey_channel
from halfstep.web.view.decoding import Decoder
from halfstep.web.view.pictures import Array, Kept
from halfstep.web.view.places import Place, Shown, line_of, parse_json

_MOST_OPEN, _MOST_NOTED = 64, 100_000  # runs
_MOST_ATTRIBUTE = 2000  # characters of one that are shown
_SEARCHED = ("prompt", "seed", "label", "model", "sample", "scheduler")
_STATES = ("at", "ahead", "last")  # pictures of a step


@dataclass(frozen=True)
class Origin:
    """What the latents of runs are, as far as anything tells it: `said` names what did."""

    spec: LatentSpec | None
    said: str


@dataclass(frozen=True)
class OpenRun:
    """A run as it was when it was opened, and `token`, which is another one once it has changed."""

    token: tuple[Any, ...]
    run: Run


class Runs:
    """The stores of recorded runs that are shown. A run that was written to since is opened again."""

    def __init__(self, shown: Shown, decoder: Decoder) -> None:
        self._shown, self._decoder = shown, decoder
        self._opened: Kept[OpenRun] = Kept(_MOST_OPEN)
        self._noted: Kept[dict[str, Any]] = Kept(_MOST_NOTED)
        self._metrics: Kept[dict[str, list[float | None]]] = Kept(_MOST_OPEN)
        self._origins: Kept[Origin] = Kept(_MOST_OPEN)

    def facts(self, path: Path) -> dict[str, Any]:
        """The reports that lie beside the runs."""
        return {"reports": self._shown.reports(path)}

    def rows(self, path: Path, wanted: str, start: int, count: int) -> dict[str, Any]:
        """Runs whose name, prompt, seed, label or model has `wanted` in it, from number `start` on."""
        runs = self._store(path)
        keys, words = list(runs), wanted.casefold().split()
        total = len(keys)
        if words:
            keys = [key for key in keys if all(word in self._searched(path, runs, key) for word in words)]
        return {
            "total": total,
            "matching": len(keys),
            "rows": [self._row(path, runs, key) for key in keys[start:][:count]],
        }

    def run(self, path: Path, key: str) -> dict[str, Any]:
        """One run: its steps and what was noted of it."""
        opened = self._open(path, key)
        run = opened.run
        shape = list(run.latents.shape[1:])
        return {
            "key": key,
            "prompt": run.prompt,
            "seed": run.seed,
            "steps": run.steps.tolist(),
            "sigmas": run.sigmas.tolist(),
            "timesteps": run.timesteps.tolist(),
            "shape": shape,
            "attributes": {name: _shortened(value) for name, value in run.attributes.items()},
            "problems": list(run.problems),
        }

    def decoding(self, path: Path, key: str) -> dict[str, str | None]:
        """As what a run is decoded, or why it cannot be. Slow the first time: it loads the autoencoder."""
        opened = self._open(path, key)
        origin, shape = self._origin(path, opened), opened.run.latents.shape[1:]
        why_not = self._decoder.why_not(origin.spec, shape[0]) if shape else "it has no state yet"
        return {"decoded_as": None if why_not else origin.said, "why_not": why_not}

    def metrics(self, path: Path, key: str) -> dict[str, list[float | None]]:
        """Of each step: the root-mean-square of its values, and of their change from the step before."""
        opened = self._open(path, key)
        return self._metrics.get(opened.token, lambda: _metrics(opened.run))

    def picture(self, path: Path, key: str, k: int, t: int, state: str) -> bytes:
        """What a state of step `k` shows at its time `t`, as a PNG. `state`: `at` it; `ahead`, where the step from
        it to the next, straight on, would end at noise level 0; `last` of the run."""
        opened = self._open(path, key)
        if state not in _STATES:
            raise InputError(f"state: got {state[:20]!r}; expected one of {', '.join(_STATES)}")
        place = len(opened.run) - 1 if state == "last" else k
        values = ahead(opened.run, place) if state == "ahead" else _state(opened.run, place)
        origin = self._origin(path, opened)
        return self._decoder.picture((opened.token, place, state == "ahead"), values, origin.spec, t)

    def channel(self, path: Path, key: str, k: int, channel: int, t: int) -> bytes:
        """A channel of a state, grey, as a PNG."""
        return grey_channel(_state(self._open(path, key).run, k), channel, t)

    def verify(self, path: Path) -> dict[str, Any]:
        """Every step against its checksums."""
        if not isinstance(self._store(path), TrajectoryStore):
            raise InputError(f"{path}: a batch of one file a step has no checksums to be held against")
        report = verify_trajectories(path)
        line = f"{report.steps} steps in {report.runs} runs"
        if report.incomplete:
            line += f", {len(report.incomplete)} of them incomplete"
        problems = [line.replace(f"{path}/", "") for line in report.problems]
        return {"ok": report.ok, "line": line, "problems": problems}

    def _store(self, path: Path) -> Mapping[str, Run]:
        self._shown.require_inside(path)
        with file_errors(path):
            return open_trajectories(path)

    def _open(self, path: Path, key: str) -> OpenRun:
        runs = self._store(path)
        if isinstance(runs, TrajectoryStore):
            if key not in runs:
                raise InputError(f"{path}: no run {key[:80]!r}")
            folder = path / key
            token = (folder, *(_changed(folder / name) for name in ("zarr.json", "journal", "latents/zarr.json", ".")))
        else:
            folder, token = path, (path, key)

        def make() -> OpenRun:
            names = [entry.name for entry in os.scandir(folder) if entry.is_dir(follow_symlinks=False)]
            self._shown.require_inside(folder, *(names if folder != path else ()))
            return OpenRun(token, runs[key])

        with file_errors(path):
            return self._opened.get(token, make)

    def _row(self, path: Path, runs: Mapping[str, Run], key: str) -> dict[str, Any]:
        try:
            noted = self._attributes(path, runs, key)
        except (HalfstepError, OSError) as error:
            return {"key": key, "problem": line_of(error)}
        problems = noted.get("problems")
        return {
            "key": key,
            **{name: noted.get(name) for name in ("prompt", "seed", "label", "model", "steps", "guidance", "recorded")},
            "complete": bool(noted.get("complete")),
            "problems": len(problems) if isinstance(problems, list) else 0,
        }

    def _attributes(self, path: Path, runs: Mapping[str, Run], key: str) -> dict[str, Any]:
        if isinstance(runs, TrajectoryStore):
            file = path / key / "zarr.json"
            return self._noted.get((file, _changed(file)), lambda: self._within(file, runs, key))

        def make() -> dict[str, Any]:
            run = runs[key]
            return {**run.attributes, "prompt": run.prompt, "seed": run.seed, "problems": list(run.problems)}

        return self._noted.get((str(path), key), make)

    def _within(self, file: Path, runs: TrajectoryStore, key: str) -> dict[str, Any]:
        self._shown.file(file)
        return runs.noted(key)

    def _searched(self, path: Path, runs: Mapping[str, Run], key: str) -> str:
        """What a filter looks through; of a batch of older tools the names alone, for all else is in many files."""
        if not isinstance(runs, TrajectoryStore):
            return key.casefold()
        try:
            noted = self._attributes(path, runs, key)
        except (HalfstepError, OSError):
            return key.casefold()
        return " ".join([key, *(str(noted[name]) for name in _SEARCHED if noted.get(name) is not None)]).casefold()

    def _origin(self, path: Path, opened: OpenRun) -> Origin:
        return self._origins.get(opened.token, lambda: self._find_origin(path, opened.run))

    def _find_origin(self, path: Path, run: Run) -> Origin:
        """What tells the autoencoder of a run: the checkpoint that its samples are of, when it lies in what is shown;
        else the one store of latents that is shown with as many channels."""
        checkpoint = self._checkpoint(path, run)
        if checkpoint is not None and (spec := _spec_of(checkpoint)) is not None:
            return Origin(spec, f"latents of {spec.autoencoder}, as its checkpoint says")
        channels = run.latents.shape[1] if len(run.latents.shape) > 1 else 0
        for place in self._datasets():
            stored = _manifest_spec(self._shown.path(place.at))
            if stored is not None and stored.channels == channels:
                return Origin(stored, f"latents of {stored.autoencoder}, as those in {place.name}: nothing else says")
        return Origin(None, "latents of the autoencoder that was named")

    def _checkpoint(self, path: Path, run: Run) -> Path | None:
        """Where the network of a run lies, by its own word or that of the samples it was recorded with."""
        named = [run.attributes.get("model")]
        try:
            samples = self._shown.file(path.parent / "samples.json")
            named.insert(0, parse_json(samples.read_bytes())["settings"]["ckpt"])
        except (HalfstepError, OSError, ValueError, KeyError, TypeError):
            pass  # the run's own word is left
        for name in named:
            try:
                return self._shown.inside(Path(str(name)))
            except (HalfstepError, ValueError):
                continue  # not in what is shown: not ours to look into
        return None

    def _datasets(self) -> list[Place]:
        return [place for place in self._shown.find().places if place.kind == "dataset"]


def ahead(run: Run, k: int) -> Array:
    """Where the step from state `k` to the next, straight on, ends at noise level 0: what a first-order sampler of a
    flow predicts the end to be at `k`. Raises InputError where the noise levels do not tell it."""
    here = _state(run, k)
    if k + 1 >= len(run):
        return here
    levels = run.sigmas[k : k + 2]
    way = float(levels[1] - levels[0])
    if not np.isfinite(levels).all() or way == 0:
        raise InputError(f"{run.key}: the noise levels of steps {k} and {k + 1} do not tell where it goes")
    values: Array = here + (run.latents[k + 1] - here) * np.float32(-levels[0] / way)
    return values


def _state(run: Run, k: int) -> Array:
    if not 0 <= k < len(run):
        raise InputError(f"{run.key}: got step {k}; it has {len(run)} states")
    return run.latents[k]


def _rms(values: Array) -> float:
    return math.sqrt(float(np.square(values, dtype=np.float64).mean()))


def _metrics(run: Run) -> dict[str, list[float | None]]:
    norms: list[float | None] = []
    changes: list[float | None] = []
    before: Array | None = None
    for k in range(len(run)):
        try:
            state: Array | None = run.latents[k]
        except StoreError:  # its picture says why
            state = None
        norms.append(None if state is None else _rms(state))
        changes.append(None if state is None or before is None else _rms(state - before))
        before = state
    return {"norm": norms, "change": changes}


def _spec_of(checkpoint: Path) -> LatentSpec | None:
    """The latents that a network was trained on, from the head of its file; None when that does not say it."""
    from safetensors import SafetensorError, safe_open

    from halfstep.models import About
    from halfstep.models.weights import newest_checkpoint

    place = newest_checkpoint(checkpoint) or checkpoint
    file = place if place.is_file() else place / "ema.safetensors"
    try:
        with safe_open(file, "np") as opened:
            return About.from_metadata(opened.metadata() or {}, file).latents
    except (OSError, ValueError, SafetensorError):
        return None


def _manifest_spec(path: Path) -> LatentSpec | None:
    try:
        return parse_manifest((path / MANIFEST_NAME).read_bytes(), str(path)).spec
    except (HalfstepError, OSError):
        return None  # its own page says what is wrong with it


def _changed(path: Path) -> tuple[int, int, int]:
    try:
        found = path.stat()
    except FileNotFoundError:
        return 0, 0, 0
    return found.st_ino, found.st_mtime_ns, found.st_size


def _shortened(value: Any) -> Any:
    text = value if isinstance(value, str) else json.dumps(value, default=str)
    return value if len(text) <= _MOST_ATTRIBUTE else f"{text[:_MOST_ATTRIBUTE]} ..."
