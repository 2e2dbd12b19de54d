"""The folders that are shown, and nothing outside of them: what lies where, and by which name a page asks for it."""

from __future__ import annotations

import json
import os
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal
from urllib.parse import quote, unquote_to_bytes

from halfstep.errors import InputError, printable
from halfstep.files import file_errors
from halfstep.store.trajectory_layout import RUN_PATTERN
from halfstep.web.guard import Refusal

Kind = Literal["dataset", "runs", "training", "streamed", "folder"]

_DEEPEST = 4  # folders below one that is shown that are looked into
_MOST_FOLDERS = 4000  # that are looked at for one list
_MOST_JSON_BYTES = 16 << 20
_USUAL_NAMES = ("latents", "runs")  # of trajectory stores
_NONE = (
    "no dataset store (manifest.json), no recorded runs (zarr.json), no training run (config.json with log.jsonl) and "
    "no streamed run (run.json)"
)


@dataclass(frozen=True)
class Place:
    """A folder that can be shown. `at`: what a page calls it, of ASCII alone."""

    at: str
    name: str
    kind: Kind


@dataclass(frozen=True)
class Found:
    """The places below a folder; not `complete` where more folders were there than are looked at."""

    places: list[Place]
    complete: bool


class Shown:
    """The folders given, `roots`, by number. Raises InputError for what is no folder."""

    def __init__(self, paths: Sequence[Path]) -> None:
        for path in paths:
            if not path.is_dir():
                raise InputError(f"{path}: {'is a file' if path.exists() else 'is not there'}; name a folder to view")
        self.roots = tuple(path.resolve() for path in paths)

    def path(self, at: str) -> Path:
        """The folder that a page calls `at`. Raises Refusal when it is not there, or outside of the folders given."""
        number, _, rest = at.partition("/")
        if not (number.isascii() and number.isdecimal() and len(number) < 20 and int(number) < len(self.roots)):
            raise Refusal(f"{at[:80]!a}: no such folder", 404)
        parts = [os.fsdecode(unquote_to_bytes(part)) for part in rest.split("/")] if rest else []
        if any(part in ("", ".", "..") or "/" in part or "\0" in part for part in parts):
            raise Refusal(f"{at[:80]!a}: is no place within the folders that are shown")
        return self.inside(self.roots[int(number)].joinpath(*parts))

    def inside(self, path: Path) -> Path:
        """`path` without links. Raises Refusal where it leads out of the folders given, or is not there."""
        try:
            resolved = path.resolve(strict=True)
        except FileNotFoundError:
            raise Refusal(f"{printable(str(path))}: is not there", 404) from None
        except (OSError, RuntimeError) as error:  # a link to itself
            raise Refusal(f"{printable(str(path))}: cannot be followed ({error})") from error
        if not any(resolved.is_relative_to(root) for root in self.roots):
            raise Refusal(f"{printable(str(path))}: leads out of the folders that are shown")
        return resolved

    def file(self, path: Path) -> Path:
        """The same of a file. Raises Refusal for a folder, or a pipe, which might never end."""
        resolved = self.inside(path)
        if not resolved.is_file():
            raise Refusal(f"{printable(str(path))}: is no file", 404)
        return resolved

    def require_inside(self, folder: Path, *names: str) -> None:
        """Raise Refusal when a file or folder directly in `folder`, or in one of its folders `names`, is a link that
        leads out of the folders given."""
        for place in (folder, *(folder / name for name in names)):
            if place.is_dir():
                self.inside(place)
                with os.scandir(place) as entries:
                    for entry in entries:
                        if entry.is_symlink():
                            self.inside(Path(entry.path))

    def at(self, path: Path) -> str:
        """What a page calls a folder within the folders given."""
        number = next(n for n, root in enumerate(self.roots) if path.is_relative_to(root))
        parts = path.relative_to(self.roots[number]).parts
        return "/".join([str(number), *(quote(os.fsencode(part), safe="") for part in parts)])

    def crumbs(self, path: Path) -> list[dict[str, str]]:
        """The folders above `path`, down from the one given, and itself."""
        root = next(root for root in self.roots if path.is_relative_to(root))
        way = [path, *path.parents]
        return [{"at": self.at(p), "name": _name(p)} for p in reversed(way[: way.index(root) + 1])]

    def find(self, path: Path | None = None) -> Found:
        """The places below a folder, or below all that are given; those that are one themselves too."""
        starts = self.roots if path is None else (path,)
        places: list[Place] = []
        complete = True
        seen: set[Path] = set()
        for start in starts:
            looked = list(islice(self._below(start), _MOST_FOLDERS + 1))
            complete = complete and len(looked) <= _MOST_FOLDERS
            for folder, kind in sorted(looked[:_MOST_FOLDERS]):
                if kind != "folder" and folder not in seen:
                    seen.add(folder)
                    name = _name(start) if folder == start else str(folder.relative_to(start))
                    if len(starts) > 1 and folder != start:
                        name = f"{_name(start)}/{name}"
                    places.append(Place(self.at(folder), printable(name), kind))
        return Found(places, complete)

    def _below(self, start: Path) -> Iterator[tuple[Path, Kind]]:
        """`start` and the folders below it, nearest first: one with very many in it hides none beside it."""
        waiting = deque([(start, 0)])
        while waiting:
            folder, depth = waiting.popleft()
            kind = kind_of(folder)
            yield folder, kind
            if kind != "folder" or depth == _DEEPEST:
                continue
            try:
                with os.scandir(folder) as entries:
                    names = sorted(e.name for e in entries if e.is_dir(follow_symlinks=False) and e.name[0] != ".")
            except OSError:
                continue  # not ours to read: as if it were empty
            waiting.extend((folder / name, depth + 1) for name in names)

    def reports(self, path: Path) -> list[dict[str, str]]:
        """Analyses in or beside a folder of recorded runs."""
        places: list[Path] = []
        for folder in (path, path.parent):
            if any(folder.is_relative_to(root) for root in self.roots):
                with os.scandir(folder) as entries:
                    names = sorted(entry.name for entry in entries if entry.is_dir(follow_symlinks=False))
                places += [folder, *(folder / name for name in names[:_MOST_FOLDERS])]
        found = [p for p in places if (p / "analysis.json").is_file() and (p / "report.html").is_file()]
        return [{"at": self.at(place), "name": _name(place)} for place in dict.fromkeys(found)]

    def report(self, path: Path) -> bytes:
        """The page of an analysis in a folder."""
        if not (path / "analysis.json").is_file():
            raise Refusal(f"{printable(str(path))}: holds no analysis", 404)
        page = self.file(path / "report.html")
        with file_errors(page):
            return page.read_bytes()


def kind_of(folder: Path) -> Kind:
    """What lies in a folder, by the files that tell it; `folder` when it is none of ours."""
    if _is_dataset(folder):
        return "dataset"
    if _is_trajectories(folder):
        return "runs"
    report = folder / "run.json"
    if report.is_file() and ((folder / "events").is_dir() or "sessions" in _read(report)):
        return "streamed"
    if (folder / "config.json").is_file() and (folder / "log.jsonl").is_file():
        return "training"
    return "folder"


def none_of_ours(folder: Path) -> str:
    """What a folder is not, for one in which nothing is found."""
    return f"{printable(str(folder))}: {_NONE} lies here or below"


def _is_dataset(folder: Path) -> bool:
    manifest = folder / "manifest.json"
    if (folder / "index").is_dir() and (folder / "shards").is_dir():
        return True
    return manifest.is_file() and _read(manifest).get("format") == "halfstep-dataset"


def _is_trajectories(folder: Path) -> bool:
    group = folder / "zarr.json"
    if group.is_file() and (content := _read(group)):
        attributes = content.get("attributes")
        return isinstance(attributes, dict) and "halfstep_trajectories" in attributes
    if (group.is_file() or folder.name in _USUAL_NAMES) and any(folder.glob(RUN_PATTERN)):
        return True  # a store whose own file is damaged or lost
    first = next(folder.glob("prompt_[0-9]*"), None)  # steps as older tools wrote them
    return first is not None and next(first.rglob("step_[0-9]*"), None) is not None


def _read(path: Path) -> dict[str, Any]:
    """The JSON object in a file; nothing where it is none, damaged, or far larger than ours are."""
    try:
        if path.stat().st_size > _MOST_JSON_BYTES:
            return {}
        content = parse_json(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _name(path: Path) -> str:
    return printable(path.name or str(path))


def parse_json(data: bytes | str) -> Any:
    """What JSON says. Raises ValueError for what is none, however it fails to be."""
    try:
        return json.loads(data)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def line_of(error: Exception) -> str:
    """An error as the one line of a page."""
    return " ".join(str(error).split())
