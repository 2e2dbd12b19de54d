"""Small runs of encode, and what they leave."""

from pathlib import Path
from typing import Any

import numpy as np

from halfstep.data.sources import SourceConfig
from halfstep.encode import EncodeOptions, EncodeReport, encode
from halfstep.store import DatasetStore


def run(
    source: Path | list[Path], output: Path, *, kind: str | None = None, dry_run: bool = False, **options: Any
) -> EncodeReport:
    paths = source if isinstance(source, list) else [source]
    sources = [SourceConfig(path=path, kind=kind) for path in paths]
    defaults = {"precision": "fp32", "storage": "fp32", "size": (32, 32), "batch_size": 4}
    return encode(sources, EncodeOptions(output, **{**defaults, **options}), dry_run=dry_run)


def content(root: Path, *, raw: bool = True) -> dict[str, np.ndarray]:
    store = DatasetStore.open(root)
    return {key: np.array(store.read(key, raw=raw)) for key in store.keys()}


def same(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> bool:
    return a.keys() == b.keys() and all(np.array_equal(a[key], b[key]) for key in a)
