"""What a path holds: the sequences of one kind, what of them cannot be used, and what is left out."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Literal

from halfstep.data import pictures, pt_tree, videos
from halfstep.data.pictures import frames_in
from halfstep.data.tree import Found, list_tree
from halfstep.data.walks import POSES_FILE
from halfstep.errors import InputError, some

Kind = Literal["pictures", "videos", "walks", "latents"]

# Pictures and videos that only other programs read. They are counted, so that nobody misses them unawares.
_FOREIGN = (
    "ai arw braw cr2 cr3 crm dng emf eps exr heic heif hif jxl jxr mng nef orf pef ps r3d raf raw rw2 srw svg "
    "svgz swf wmf xcf"
)
_MEDIA = pictures.EXTENSIONS | videos.EXTENSIONS | {f".{name}" for name in _FOREIGN.split()}


@dataclass(frozen=True)
class Listing:
    """`files` are names below `root`, sorted: pictures and videos themselves, and for walks and latents the
    folders that hold them. `lost` are folders that cannot be used, with the reason: as a walk, or, when they are
    among the `unlisted`, at all. `notes` are lines on what else is left out."""

    root: Path
    kind: Kind
    files: tuple[str, ...]
    lost: dict[str, str]
    unlisted: frozenset[str]
    notes: tuple[str, ...]


def list_path(path: Path, kind: Kind | None = None) -> Listing:
    """List what is there. Raises InputError when the path is missing, has nothing of the kind, or, where no kind is
    given, several of them."""
    if not path.exists():
        raise InputError(f"{path}: no such file or folder")
    found = Found([path.name]) if path.is_file() else list_tree(path)
    if "" in found.unreadable:
        raise InputError(f"{path}: cannot be listed ({found.unreadable['']})")
    root = named(path).parent if path.is_file() else named(path)
    posed = {_folder(name) for name in found.files if name.rpartition("/")[2] == POSES_FILE}
    by_kind = _by_kind(found.files, posed)
    poseless: dict[str, list[str]] = {}
    if by_kind["walks"] and kind in (None, "walks"):
        poseless = _walks_without_poses(by_kind["pictures"], posed)
        by_kind["pictures"] = [name for name in by_kind["pictures"] if _folder(name) not in poseless]
    kind = kind or _only_kind(path, by_kind)
    if kind == "videos":
        by_kind["videos"] += [name for name in by_kind["pictures"] if frames_in(root / name) > 1]
    reasons = {folder: f"cannot be listed ({reason})" for folder, reason in found.unreadable.items()}
    for folder, held in poseless.items():
        reasons[folder] = f"has {len(held)} pictures but no {POSES_FILE}; copy that too, or take the folder away"
    if kind in ("walks", "latents"):
        wanted = "pictures" if kind == "walks" else "latents"
        for folder in posed - {_folder(name) for name in by_kind["walks"] + by_kind["latents"]}:
            reasons[folder] = f"has {POSES_FILE} but no numbered {wanted}; copy them too, or take the folder away"
    lost = {folder: f"{root / folder}: {reason}" for folder, reason in sorted(reasons.items())}
    files = _sequence_names(kind, by_kind[kind])
    if not files:
        raise InputError(f"{path}: no {kind} in it{''.join(f'; {reason}' for reason in [*lost.values()][:1])}")
    read = {*by_kind[kind], *(name for held in poseless.values() for name in held)}
    left = [name for name in found.files if _suffix(name) in _MEDIA and name not in read]
    special = [name for name in found.special if _suffix(name) in _MEDIA]
    notes, unlisted = tuple(_left_out(path, kind, left, special)), frozenset(found.unreadable)
    if files == ["."]:  # the path itself is the walk
        lost = {f"{root.name}/{name}": reason for name, reason in lost.items()}
        unlisted = frozenset(f"{root.name}/{name}" for name in unlisted)
        files, root = [root.name], root.parent
    return Listing(root, kind, tuple(files), lost, unlisted, notes)


def named(path: Path) -> Path:
    """The whole path under the name that the user gave it: a link is not resolved, `.` and `..` are."""
    return path.resolve() if path.name in ("", "..") else path.parent.resolve() / path.name


def _folder(name: str) -> str:
    return name.rpartition("/")[0]


def _suffix(name: str) -> str:
    return PurePosixPath(name).suffix.lower()


def _is_numbered(name: str) -> bool:
    return PurePosixPath(name).stem.isdecimal()


def _by_kind(names: list[str], posed: set[str]) -> dict[Kind, list[str]]:
    """The files of each kind. Numbered pictures beside poses are a walk's; other pictures there are not read."""
    found: dict[Kind, list[str]] = {"pictures": [], "videos": [], "walks": [], "latents": []}
    for name in names:
        suffix = _suffix(name)
        if suffix in pictures.EXTENSIONS:
            if _folder(name) not in posed:
                found["pictures"].append(name)
            elif _is_numbered(name):
                found["walks"].append(name)
        elif suffix in videos.EXTENSIONS:
            found["videos"].append(name)
        elif suffix in pt_tree.EXTENSIONS and _is_numbered(name):
            found["latents"].append(name)
    return found


def _walks_without_poses(names: list[str], posed: set[str]) -> dict[str, list[str]]:
    """Of pictures in a tree of walks, those that only lack their poses: folders of nothing but numbered pictures
    that are neither the tree's root nor inside a walk."""
    folders: dict[str, list[str]] = {}
    for name in names:
        folders.setdefault(_folder(name), []).append(name)
    return {
        folder: held
        for folder, held in folders.items()
        if folder and all(map(_is_numbered, held)) and posed.isdisjoint({"", *map(str, PurePosixPath(folder).parents)})
    }


def _only_kind(path: Path, by_kind: dict[Kind, list[str]]) -> Kind:
    present = [kind for kind, names in by_kind.items() if names]
    if not present:
        raise InputError(f"{path}: no pictures, videos, walks or latents in it")
    if len(present) > 1:
        counts = " and ".join(f"{len(_sequence_names(kind, by_kind[kind]))} {kind}" for kind in present)
        raise InputError(f"{path}: holds {counts}; name one `kind` in a YAML list of sources, or a folder of one kind")
    return present[0]


def _sequence_names(kind: Kind, names: list[str]) -> list[str]:
    """Sorted names of the sequences that files make: the files, or the folders that they are in, `.` for the root."""
    return sorted({_folder(name) or "." for name in names} if kind in ("walks", "latents") else names)


def _left_out(path: Path, kind: Kind, left: list[str], special: list[str]) -> list[str]:
    """One line on the pictures and videos that are not read, one on what is named like them and is no file."""
    lines = []
    if left:
        counts = Counter(map(_suffix, left)).most_common()
        listed = some([f"{count} {suffix}" for suffix, count in counts], 8)
        lines.append(f"{path}: {len(left)} files are left out, not read as {kind}: {listed}")
    if special:
        lines.append(f"{path}: {len(special)} pipes, sockets or devices are left out: {some(special)}")
    return lines
