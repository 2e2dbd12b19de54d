"""Which run belongs to which group."""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatchcase
from pathlib import Path

from halfstep.config import load_yaml
from halfstep.errors import InputError, some
from halfstep.store import Run


def group_by_prompt(runs: Mapping[str, Run]) -> dict[str, str]:
    """Each run by its prompt, or where it has none by the class that it is a sample of; runs without either are a group
    of their own."""
    return {key: runs[key].prompt or runs[key].attributes.get("label") or "(no prompt)" for key in runs}


def group_by_file(runs: Mapping[str, Run], path: Path) -> dict[str, str]:
    """By a YAML file of `group: [patterns]`: shell patterns of run names or prompts. Runs that no pattern matches are
    left out. Raises InputError when a pattern matches nothing, or a run falls into two groups."""
    wanted = load_yaml(path, dict[str, list[str]])
    empty = [group for group, patterns in wanted.items() if not patterns]
    if empty or not wanted:
        raise InputError(f"{path}: {some(empty) + ': no patterns' if empty else 'no groups'}; give group: [patterns]")
    groups: dict[str, str] = {}
    for group, patterns in wanted.items():
        for pattern in patterns:
            matched = [key for key in runs if fnmatchcase(key, pattern) or fnmatchcase(runs[key].prompt or "", pattern)]
            if not matched:
                raise InputError(f"{path}: {group}: {pattern!r} matches no run; their names are {some(list(runs))}")
            for key in matched:
                if groups.setdefault(key, group) != group:
                    raise InputError(
                        f"{path}: {key!r} is in {groups[key]!r} and in {group!r}; make the patterns narrower"
                    )
    return {key: groups[key] for key in runs if key in groups}
