"""YAML to frozen pydantic models, with errors that name the place: `sources.1.stride: ...`."""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from halfstep.errors import InputError

T = TypeVar("T")


class Config(BaseModel):
    """Base of all configurations: frozen, unknown keys refused."""

    model_config = ConfigDict(frozen=True, extra="forbid")


def load_yaml(path: Path, kind: type[T]) -> T:
    """Read and validate `path` as `kind`. Raises InputError with the dotted path of the first fault."""
    try:
        content: Any = yaml.safe_load(path.read_text())
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not valid YAML ({' '.join(str(error).split())[:200]})") from error
    return validate(content, kind, path)


def validate(content: Any, kind: type[T], path: Path) -> T:
    """`content` of the file `path` as `kind`. Raises InputError with the dotted path of the first fault."""
    try:
        return TypeAdapter(kind).validate_python(content)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"])) or "top level"
        raise InputError(f"{path}: {place}: got {first['input']!r}; {first['msg'].lower()}") from error
