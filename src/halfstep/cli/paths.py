"""Paths on the command line: local ones, but for those of stores, which may be URLs."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_type_hints

import typer
from typer.models import ArgumentInfo

from halfstep.errors import InputError

_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:")


def refuse_urls(app: typer.Typer) -> None:
    """Let every verb of `app` refuse a URL where it takes a path, before it does anything: as a path, `s3://bucket`
    would mean a folder named `s3:`."""
    for group in (app, *(info.typer_instance for info in app.registered_groups)):
        for command in group.registered_commands if group is not None else ():
            assert command.callback is not None
            command.callback = _with_local_paths(command.callback)


def _with_local_paths(verb: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(verb)
    def checked(**options: Any) -> Any:
        for name, value in options.items():
            for path in value if isinstance(value, list) else [value]:
                if isinstance(path, Path) and path.parts and _SCHEME.fullmatch(path.parts[0]) and not path.exists():
                    url = str(path).replace(":", "://" if path.parts[0] == "file:" else ":/", 1)
                    raise InputError(
                        f"{_as_typed(verb, name)}: got {url}; expected a local path. Stores alone are read by URL: by "
                        "train, sample, eval, store inspect and store export; recorded runs by analyze, store verify "
                        "and store convert too"
                    )
        return verb(**options)

    return checked


def _as_typed(verb: Callable[..., Any], name: str) -> str:
    """The longest flag of an option, or what stands for an argument in the help."""
    info = get_type_hints(verb, include_extras=True)[name].__metadata__[0]
    flags = sorted(info.param_decls or (), key=len)
    if isinstance(info, ArgumentInfo):
        return str(info.metavar or name).strip("[].")
    return flags[-1] if flags else f"--{name.replace('_', '-')}"
