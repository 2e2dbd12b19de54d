"""manifest.json: what the whole store has in common, with a checksum over its own bytes."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from halfstep.errors import InputError, StoreError
from halfstep.files import write_durably
from halfstep.spec import LatentSpec

NAME = "manifest.json"
FORMAT = "halfstep-dataset"
VERSION = 1
_BLANK = "0" * 64


@dataclass(frozen=True)
class Manifest:
    """Facts of a DatasetStore.

    `storage` and `policy` are those of the newest run; `recipe` holds the settings that a later run with "auto" keeps
    (batch size, resolved precision); `numerics` counts samples that were computed again in fp32 and samples refused.
    """

    spec: LatentSpec
    storage: str
    policy: str = "fp32"
    recipe: dict[str, Any] = field(default_factory=dict)
    numerics: dict[str, int] = field(default_factory=dict)
    created_with: str = ""

    def to_bytes(self) -> bytes:
        values = {"format": FORMAT, "version": VERSION, "checksum": _BLANK, **asdict(self)}
        text = json.dumps(values, indent=2)
        return text.replace(_BLANK, _digest(text), 1).encode()

    def write(self, root: Path) -> None:
        write_durably(root / NAME, self.to_bytes())


def parse_manifest(data: bytes, where: str) -> Manifest:
    """Raise InputError when the file is another format or version, StoreError when it is damaged."""
    try:
        text = data.decode()
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise StoreError(f"{where}: damaged manifest ({error}); run `halfstep store repair`") from error
    if not isinstance(values, dict) or values.get("format") != FORMAT:
        raise InputError(f"{where}: not the manifest of a dataset store; expected format {FORMAT!r}")
    if values.get("version") != VERSION:
        raise InputError(
            f"{where}: format version {values.get('version')}; this halfstep reads version {VERSION}: "
            "use the halfstep that made it, or encode into a new folder"
        )
    checksum = values.get("checksum")
    if not isinstance(checksum, str) or _digest(text.replace(checksum, _BLANK, 1)) != checksum:
        raise StoreError(f"{where}: the manifest does not match its checksum; run `halfstep store repair`")
    known = {f.name for f in fields(Manifest)}
    facts = {name: value for name, value in values.items() if name in known}
    return Manifest(**{**facts, "spec": LatentSpec.from_dict(facts["spec"])})


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
