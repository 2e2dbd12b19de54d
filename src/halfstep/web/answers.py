"""What an application answers with: values as JSON, pictures, and the files of its pages."""

from __future__ import annotations

import json
import math
from importlib.resources import files
from typing import Any

from starlette.responses import Response

from halfstep.errors import InputError
from halfstep.web.guard import Refusal

_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
_LONGEST_NAME = 100  # far above those there are, and below what no file can be called


def as_json(content: Any) -> Response:
    """`content` as JSON, where numbers that are not finite are null: JSON has none. Raises InputError for what is
    nested too deeply."""
    try:
        text = json.dumps(_plain(content))
    except RecursionError as error:
        raise InputError("what is asked for is nested too deeply to be shown") from error
    return Response(text, media_type="application/json")


def as_png(content: bytes) -> Response:
    return Response(content, media_type="image/png")


def asset(name: str) -> Response:
    """A file of `halfstep/web/assets` by its name there, of a type that pages need. Raises Refusal when there is
    none."""
    parts = name.split("/")
    kind = _TYPES.get(name[name.rfind(".") :])
    is_name = len(name) <= _LONGEST_NAME and not any(part in ("", ".", "..") or "\\" in part for part in parts)
    place = files("halfstep.web").joinpath("assets", *parts)
    if kind is None or not is_name or not name.isascii() or not place.is_file():
        raise Refusal(f"{name[:80]!a}: no such page", 404)
    return Response(place.read_bytes(), headers={"content-type": kind, "cache-control": "no-cache"})


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(name): _plain(inner) for name, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(inner) for inner in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, (str, int, bool)) else str(value)
