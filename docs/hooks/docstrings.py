"""Lists in docstrings: lines `name: what it is` below one another, which Markdown would run together."""

from __future__ import annotations

import re
from typing import Any

import griffe

_ITEM = re.compile(r"^[a-z_]\w*: +\S")
_NAME = re.compile(r"^([a-z_]\w*): +")


class DocstringLists(griffe.Extension):
    """Called by griffe for each object that it has read."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = "\n\n".join(map(_list, obj.docstring.value.split("\n\n")))


def _list(paragraph: str) -> str:
    """A paragraph of two or more such lines as a Markdown list; their continuations are indented."""
    lines = paragraph.split("\n")
    if not _ITEM.match(lines[0]) or sum(bool(_ITEM.match(line)) for line in lines) < 2:
        return paragraph
    items: list[str] = []
    for line in lines:
        if _ITEM.match(line):
            items.append(_NAME.sub(r"- **`\1`**: ", line))
        else:
            items[-1] += f" {line.strip()}"
    return "\n".join(items)
