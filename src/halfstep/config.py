"""YAML to frozen pydantic models, with errors that name the place: `sources.1.stride: ...`."""

from __future__ import annotations

import difflib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from types import UnionType
from typing import Any, TypeVar, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from halfstep.errors import InputError

T = TypeVar("T")


class Config(BaseModel):
    """Base of all configurations: frozen, unknown keys refused."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    def document(self) -> dict[str, Any]:
        """All values as JSON has them. Paths may be of any bytes, which pydantic's own JSON may not."""
        content: dict[str, Any] = json.loads(json.dumps(self.model_dump(), default=os.fspath))
        return content


class _UniqueKeys(yaml.SafeLoader):
    """Refuses a key that stands twice, of which YAML would keep the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if key.value in seen and key.tag != "tag:yaml.org,2002:merge":
                raise yaml.constructor.ConstructorError(None, None, f"{key.value!r} stands twice", key.start_mark)
            if isinstance(key.value, str):
                seen.add(key.value)
        return super().construct_mapping(node, deep)


def load_yaml(path: Path, kind: type[T], settings: Sequence[str] = ()) -> T:
    """Read and validate `path` as `kind`, with `settings` (`a.b=value`, the value in YAML) in place of what is there.
    Raises InputError with the dotted path of the first fault."""
    try:
        content: Any = yaml.load(path.read_text(), _UniqueKeys)
    except OSError as error:
        raise InputError(f"{path}: {(error.strerror or str(error)).lower()}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not valid YAML ({' '.join(str(error).split())[:200]})") from error
    return validate(with_settings(content, settings), kind, path)


def with_settings(content: Any, settings: Sequence[str]) -> Any:
    """`content` with each of `settings`, `a.b=value`, put in its place."""
    for setting in settings:
        name, separator, text = setting.partition("=")
        if not separator or not all(name.split(".")):
            raise InputError(f"--set: got {setting!r}; expected a.b=value")
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise InputError(f"--set {name}: the value {text!r} is not valid YAML") from error
        content = _put(content, name.split("."), value)
    return content


def validate(content: Any, kind: type[T], path: Path | str) -> T:
    """`content` of the file `path` as `kind`. Raises InputError with the dotted path of the first fault; an unknown key
    comes with the known one that is nearest."""
    try:
        return TypeAdapter(kind).validate_python(content)
    except ValidationError as error:
        # A misspelt key explains one that is missing; the deepest fault is of the kind that was meant.
        first = min(error.errors(), key=lambda found: (found["type"] != "extra_forbidden", -len(found["loc"])))
        place = ".".join(map(str, _walk(kind, first["loc"])[1])) or "top level"
        if first["type"] == "extra_forbidden":
            known, _ = _walk(kind, first["loc"][:-1])
            near = difflib.get_close_matches(str(first["loc"][-1]), known, n=1, cutoff=0.4)
            hint = f"did you mean {near[0]!r}?" if near else f"expected one of {', '.join(known)}"
            raise InputError(f"{path}: {place}: unknown key; {hint}") from error
        if first["type"] == "value_error" and not first["loc"]:  # of several keys together
            raise InputError(f"{path}: {first['ctx']['error']}") from error
        if first["type"] == "missing":
            raise InputError(f"{path}: {place}: is not given") from error
        raise InputError(
            f"{path}: {place}: got {first['input']!r}; {first['msg'][:1].lower()}{first['msg'][1:]}"
        ) from error


def _put(content: Any, names: list[str], value: Any) -> Any:
    if not names:
        return value
    inner = content if isinstance(content, dict) else {}
    return {**inner, names[0]: _put(inner.get(names[0]), names[1:], value)}


def _walk(kind: Any, place: tuple[int | str, ...]) -> tuple[list[str], list[int | str]]:
    """The keys that `kind` has at `place`, and `place` without the names of the alternatives of a union, which pydantic
    puts in and nobody wrote."""
    if get_origin(kind) in (Union, UnionType):
        parts = get_args(kind)
        if place and (chosen := [part for part in parts if getattr(part, "__name__", None) == place[0]]):
            return _walk(chosen[0], place[1:])
        return [key for part in parts for key in _walk(part, place)[0]], list(place)
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        if not place:
            return list(kind.model_fields), []
        field = kind.model_fields.get(str(place[0]))
        keys, names = ([], list(place[1:])) if field is None else _walk(field.annotation, place[1:])
        return keys, [place[0], *names]
    if place and get_args(kind):
        keys, names = _walk(get_args(kind)[-1], place[1:])
        return keys, [place[0], *names]
    return [], list(place)
