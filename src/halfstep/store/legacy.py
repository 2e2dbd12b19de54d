"""Batches of latents in the older format, one file a step, read as they are: a mapping from video ids to `Run`.

`<batch>/latents/prompt_000/vid_001/step_000.npy.gz` (or `.npy`, `.pt`, `.pt.gz`) beside `step_000_metadata.json`, and a
`summary.json` once the video was done; other ids lie in `<id>/vid_001`, an older layout has the steps directly in
`prompt_000`. These files were written after the scheduler's step: file i is labeled with sigma[i] but holds the state
at sigma[i+1], and the first noise is not there. `Run.sigmas` and `Run.timesteps` are those of the state; the labels as
found are in `attributes["sigma_labels"]` and `["timestep_labels"]`.
"""

from __future__ import annotations

import gzip
import io
import json
import math
import re
import tokenize
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import IO, Any

import numpy as np

from halfstep.errors import HalfstepError, InputError, StoreError, some
from halfstep.store.run import Float32, Latents, Rounding, Run
from halfstep.store.torch_files import read_torch_tensor

_STEP = re.compile(r"step_(\d+)(\.npy\.gz|\.npy|\.pt\.gz|\.pt)")
_PROMPT = re.compile(r"prompt_\d+")
_VIDEO = re.compile(r"vid_(\d+)")
_TYPES = {"torch.float16": "fp16", "torch.bfloat16": "bf16"}
_SHARED = ("total_steps", "prompt", "seed", "cfg_scale", "shape", "dtype")  # what all steps of one run agree on
# What numpy, gzip, zip and pickle raise for bytes that are not what they were.
_DAMAGE = (OSError, EOFError, ValueError, TypeError, SyntaxError, NotImplementedError, tokenize.TokenError, zlib.error)


class LegacyBatch(Mapping[str, Run]):
    """The runs below a batch folder or its `latents` folder."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._folders = _find_runs(root / "latents" if (root / "latents").is_dir() else root)
        if not self._folders:
            raise StoreError(f"{root}: no recorded steps here (step_000.npy.gz and the like below latents/)")

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._folders))

    def __len__(self) -> int:
        return len(self._folders)

    def __getitem__(self, key: str) -> Run:
        folder = self._folders.get(key)
        if folder is None:
            raise InputError(f"{self.root}: no run {key!r} (of {len(self)}); `.keys()` lists them")
        return self._read_run(key, folder)

    def _read_run(self, key: str, folder: Path) -> Run:
        files = _step_files(folder)
        metadata, problems = _read_metadata(folder)
        summary = _read_summary(folder, problems)
        shared, agreeing = _agree(metadata, problems)
        shape = tuple(shared.get("shape") or ())
        kept: dict[int, Path] = {}
        for step, path in sorted(files.items()):
            if step in metadata and step not in agreeing:
                problems.append(f"stale: {path.name} belongs to another run; left out")
            elif summary is not None and step not in summary:
                problems.append(f"stale: {path.name} is not among the steps of summary.json; left out")
            elif (damage := _damage(path, shape)) is not None:
                problems.append(f"damaged or truncated: {path.name}: {damage}; left out")
            else:
                kept[step] = path
        total = shared.get("total_steps")
        problems += _gaps(summary, set(files), metadata, total)
        steps = sorted(kept)
        labels = {step: (metadata[step].get("sigma"), metadata[step].get("timestep")) for step in agreeing}
        found, corrected = self._labels(labels, steps, total, problems)
        attributes = {name: value for name, value in shared.items() if name not in ("prompt", "seed", "shape")}
        if "cfg_scale" in attributes:
            attributes["guidance"] = attributes.pop("cfg_scale")
        attributes |= {
            "complete": summary is not None,
            "initial_noise": False,
            "latents_format": str(shared.get("dtype", "unknown")).removeprefix("torch."),
            "latents_exact": shared.get("dtype") == "torch.float32",
            "sigma_labels": [_json_number(sigma) for sigma, _ in found],
            "timestep_labels": [_json_number(timestep) for _, timestep in found],
        }
        paths = [kept[step] for step in steps]
        step_shape = shape[1:] if shape[:1] == (1,) else shape
        if not shape and paths:
            step_shape = read_step(paths[0]).shape
        return Run(
            key=key,
            steps=np.array(steps, np.int64),
            timesteps=np.array([timestep for _, timestep in corrected], np.float64),
            sigmas=np.array([sigma for sigma, _ in corrected], np.float64),
            latents=Latents(len(steps), step_shape, lambda k: read_step(paths[k])),
            prompt=shared.get("prompt"),
            seed=shared.get("seed"),
            attributes=attributes,
            problems=tuple(problems),
            rounding=Rounding.of({_TYPES.get(shared.get("dtype", ""), "fp32"): 1.0}),
        )

    def _labels(
        self, labels: dict[int, tuple[Any, Any]], steps: list[int], total: int | None, problems: list[str]
    ) -> tuple[list[tuple[float, float]], list[tuple[float, float]]]:
        """Sigma and timestep of each kept step, as found and as they are. What the next step's own label does not tell,
        another run of the batch with the same schedule may; after the last step both are zero."""
        found = [_numbers(labels.get(step, (None, None))) for step in steps]
        schedule = {step: _numbers(pair) for step, pair in labels.items()}
        if total is not None and any(step + 1 < total and step + 1 not in schedule for step in steps):
            for other in self._schedules.get(total, []):
                if all(other.get(step, pair) == pair for step, pair in schedule.items()):
                    schedule = {**other, **schedule}
        if total is not None:
            schedule[total] = (0.0, 0.0)
        corrected = [schedule.get(step + 1, (math.nan, math.nan)) for step in steps]
        unknown = [step for step, (sigma, _) in zip(steps, corrected, strict=True) if math.isnan(sigma)]
        if unknown:
            problems.append(f"missing: the noise level after step {some(unknown)} is nowhere in the batch")
        return found, corrected

    @cached_property
    def _schedules(self) -> dict[int, list[dict[int, tuple[float, float]]]]:
        """The labels of all runs by their number of steps, the fullest first."""
        schedules: dict[int, list[dict[int, tuple[float, float]]]] = {}
        for folder in self._folders.values():
            metadata, _ = _read_metadata(folder)
            shared, agreeing = _agree(metadata, [])
            if shared.get("total_steps") is not None:
                labels = {s: _numbers((metadata[s].get("sigma"), metadata[s].get("timestep"))) for s in agreeing}
                schedules.setdefault(shared["total_steps"], []).append(labels)
        return {total: sorted(found, key=len, reverse=True) for total, found in schedules.items()}


def read_step(path: Path) -> Float32:
    """The latents of one step file as float32, without the leading batch axis of one. Raises StoreError naming the
    file when it is damaged."""
    try:
        data = path.read_bytes()
        # All of it at once: the checksum of a gzip file stands at its end.
        file = io.BytesIO(gzip.decompress(data) if path.suffix == ".gz" else data)
        if ".pt" in path.suffixes:
            values = read_torch_tensor(file, str(path))
        else:
            values = np.lib.format.read_array(file, allow_pickle=False).astype(np.float32)
    except HalfstepError:
        raise
    except _DAMAGE as error:
        raise StoreError(f"{path}: damaged ({error}); this step is lost, the others are not") from error
    return values[0] if values.ndim > 1 and values.shape[0] == 1 else values


def step_bytes(latents: Float32, dtype: str) -> bytes:
    """The `.npy.gz` of `latents` [C, (T,) H, W] in the older format: with its batch axis, in numpy type `dtype`."""
    plain = io.BytesIO()
    np.lib.format.write_array(plain, latents[None].astype(dtype), allow_pickle=False)
    return gzip.compress(plain.getvalue(), compresslevel=9, mtime=0)


def _find_runs(latents: Path) -> dict[str, Path]:
    folders: dict[str, Path] = {}
    for outer in sorted(path for path in latents.iterdir() if path.is_dir()):
        for inner in sorted(path for path in outer.iterdir() if path.is_dir()):
            if (video := _VIDEO.fullmatch(inner.name)) and _step_files(inner):
                suffix = f"_vid{int(video[1]):03d}" if _PROMPT.fullmatch(outer.name) or int(video[1]) != 1 else ""
                folders[outer.name + suffix] = inner
        if _step_files(outer):
            metadata, _ = _read_metadata(outer)
            named = Counter(content.get("video_id") for content in metadata.values()).most_common(1)
            name = named[0][0] if named and isinstance(named[0][0], str) else outer.name
            folders[outer.name if name in folders else name] = outer
    return folders


def _step_files(folder: Path) -> dict[int, Path]:
    return {int(match[1]): path for path in sorted(folder.iterdir()) if (match := _STEP.fullmatch(path.name))}


def _read_metadata(folder: Path) -> tuple[dict[int, dict[str, Any]], list[str]]:
    metadata: dict[int, dict[str, Any]] = {}
    problems = []
    for path in sorted(folder.glob("step_*_metadata.json")):
        number = path.name.removeprefix("step_").removesuffix("_metadata.json")
        if not number.isdecimal():
            continue
        try:
            content = json.loads(path.read_text())
        except (ValueError, OSError) as error:
            problems.append(f"damaged: {path.name} ({error})")
            continue
        if isinstance(content, dict):
            metadata[int(number)] = content
        else:
            problems.append(f"damaged: {path.name} is no JSON object")
    return metadata, problems


def _read_summary(folder: Path, problems: list[str]) -> set[int] | None:
    """The steps that summary.json lists; None when the run has none."""
    path = folder / "summary.json"
    if not path.exists():
        problems.append("missing: summary.json, which a run that finished has")
        return None
    try:
        return {int(step) for step in json.loads(path.read_text())["stored_steps"]}
    except (ValueError, KeyError, TypeError) as error:
        problems.append(f"damaged: summary.json ({type(error).__name__}: {error})")
        return None


def _agree(metadata: dict[int, dict[str, Any]], problems: list[str]) -> tuple[dict[str, Any], set[int]]:
    """What the steps of a run say of it, and the steps that say so; those that another run left say something else."""
    if not metadata:
        return {}, set()
    said = {step: json.dumps([content.get(name) for name in _SHARED]) for step, content in metadata.items()}
    usual = Counter(said.values()).most_common(1)[0][0]
    agreeing = {step for step, words in said.items() if words == usual}
    others = sorted(set(metadata) - agreeing)
    if others:
        problems.append(f"stale: the metadata of step {some(others)} is that of another run")
    values = dict(zip(_SHARED, json.loads(usual), strict=True))
    return {name: value for name, value in values.items() if value is not None}, agreeing


def _gaps(
    summary: set[int] | None, files: set[int], metadata: dict[int, dict[str, Any]], total: int | None
) -> list[str]:
    problems = []
    unlabeled = sorted(files - set(metadata))
    if unlabeled:
        problems.append(f"missing: the metadata of step {some(unlabeled)}; their noise levels are not known")
    if summary is not None:
        expected = summary
    elif total is not None and files:
        interval = math.gcd(*files) or 1 if len(files) > 1 else total
        expected = set(range(0, total, interval)) | set(metadata)
        after = sorted(expected - files)
        if after and min(after) > max(files):
            return [*problems, f"short: it ends after step {max(files)} of {total}"]
    else:
        expected = set(metadata)
    missing = sorted(expected - files)
    return [*problems, f"missing: the latents of step {some(missing)}"] if missing else problems


def _damage(path: Path, expected_shape: tuple[int, ...]) -> str | None:
    """What is wrong with a step file, as far as that can be seen without decompressing a `.npy.gz`."""
    try:
        if ".pt" in path.suffixes:
            shape = (1, *read_step(path).shape)
        else:
            with _opened(path) as file:
                version = np.lib.format.read_magic(file)
                read_header = {1: np.lib.format.read_array_header_1_0, 2: np.lib.format.read_array_header_2_0}
                shape, _, dtype = read_header.get(version[0], np.lib.format.read_array_header_2_0)(file)
                expected = file.tell() + math.prod(shape) * dtype.itemsize
            size = _uncompressed_size(path) if path.suffix == ".gz" else path.stat().st_size
            if size != expected % 2**32:
                return f"got {size} bytes of {expected}"
    except StoreError as error:
        return str(error).removeprefix(f"{path}: ")
    except _DAMAGE as error:
        return str(error)
    if expected_shape and shape != expected_shape:
        return f"got the shape {list(shape)}; the run has {list(expected_shape)}"
    return None


def _uncompressed_size(path: Path) -> int:
    """What the last four bytes of a gzip file say: its size modulo 2^32 (RFC 1952)."""
    with path.open("rb") as file:
        file.seek(-4, 2)
        return int.from_bytes(file.read(4), "little")


def _opened(path: Path) -> IO[bytes]:
    return gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb")  # type: ignore[return-value]


def _numbers(pair: tuple[Any, Any]) -> tuple[float, float]:
    sigma, timestep = (
        float(value) if isinstance(value, (int, float)) and math.isfinite(value) else math.nan for value in pair
    )
    return sigma, timestep


def _json_number(value: float) -> float | None:
    return None if math.isnan(value) else value
