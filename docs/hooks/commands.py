"""The page of commands, made from the program itself: `<!-- commands -->` becomes every verb with its options."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import typer

from halfstep.cli import app

MARK = "<!-- commands -->"
_KINDS = {"int": "N", "float": "X", "str": "TEXT", "Path": "PATH"}


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Called by MkDocs for each page."""
    if MARK not in markdown:
        return markdown
    return markdown.replace(MARK, "\n".join(_verbs(typer.main.get_command(app), "halfstep")))


def _verbs(command: Any, name: str) -> Iterator[str]:
    for verb, inner in getattr(command, "commands", {}).items():
        if hasattr(inner, "commands"):
            if inner.invoke_without_command:
                yield from _verb(inner, f"{name} {verb}")
            yield from _verbs(inner, f"{name} {verb}")
            continue
        yield from _verb(inner, f"{name} {verb}")


def _verb(verb: Any, name: str) -> Iterator[str]:
    arguments = [p for p in verb.params if p.param_type_name == "argument"]
    options = [p for p in verb.params if p.param_type_name == "option" and "--help" not in p.opts]
    yield from (f"## `{name}`", "", " ".join((verb.help or "").split()), "")
    yield from ("| | |", "|---|---|")
    yield from (f"| `{_metavar(p)}` | {_cell(p.help)} |" for p in arguments)
    yield from (f"| {_flags(p)} | {_cell(p.help)}{_default(p)} |" for p in options)
    yield ""


def _flags(option: Any) -> str:
    flags = ", ".join(f"`{flag}`" for flag in (*option.opts, *option.secondary_opts))
    return flags if option.is_flag else f"{flags} `{_metavar(option)}`"


def _metavar(parameter: Any) -> str:
    kind = getattr(parameter.type_descriptor.annotation, "__name__", "value")
    return str(parameter.metavar or _KINDS.get(kind, parameter.name)).strip("[].").replace("|", " or ")


def _default(option: Any) -> str:
    if option.required:
        return " **Required.**"
    if option.is_flag or option.default in (None, (), [], ""):
        return ""
    return f" `{option.default}` by default."


def _cell(text: str | None) -> str:
    """Help as one cell of a table; a backslash keeps brackets from the terminal's markup."""
    return re.sub(r"\\(?=\[)", "", " ".join((text or "").split())).replace("|", "\\|")
