"""What lies below a folder: each file once by each name it is given, through links, in the same order on every disk."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path

# What systems and their file servers leave behind; names that begin with a dot are left out as well.
_SYSTEM_FOLDERS = frozenset(
    {"@eaDir", "@Recycle", "#recycle", "$RECYCLE.BIN", "System Volume Information", "__MACOSX", "lost+found"}
)


@dataclass
class Found:
    """Names below the root, sorted: of `files`, and of pipes, sockets and devices (`special`), which reading would wait
    for. `unreadable` are the folders that cannot be listed, "" for the root itself, with the reason."""

    files: list[str] = field(default_factory=list)
    special: list[str] = field(default_factory=list)
    unreadable: dict[str, str] = field(default_factory=dict)


def list_tree(root: Path) -> Found:
    """All that is below `root`. Links are followed and named by the link; a folder that is inside itself, by a link to
    one above, is listed once."""
    found = Found()
    todo: list[tuple[str, frozenset[str]]] = [("", frozenset())]
    while todo:
        below, above = todo.pop()
        real = os.path.realpath(root / below)
        if real in above:
            continue
        try:
            with os.scandir(root / below) as listed:
                entries = list(listed)
        except OSError as error:
            found.unreadable[below] = error.strerror or str(error)
            continue
        for entry in entries:
            name = f"{below}/{entry.name}" if below else entry.name
            if entry.name.startswith("."):
                continue
            if _is_folder(entry):
                if entry.name not in _SYSTEM_FOLDERS:
                    todo.append((name, above | {real}))
            elif is_readable(entry):
                found.files.append(name)
            else:
                found.special.append(name)
    found.files.sort()
    found.special.sort()
    return found


def is_readable(entry: os.DirEntry[str]) -> bool:
    """False for folders, pipes, sockets and devices. True for a link that leads nowhere: reading it says so."""
    try:
        return entry.is_file() or (entry.is_symlink() and not Path(entry.path).exists())
    except OSError:
        return True


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:
        return False
