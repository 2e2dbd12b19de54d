"""Small runs of encode, and what they leave."""

from pathlib import Path
from typing import Any

import numpy as np

from halfstep.data.sources import SourceConfig
from halfstep.encode import EncodeOptions, EncodeReport, encode
from halfstep.store import DatasetStore


def run(source: Path | list[Path], output: Path, **options: Any) -> EncodeReport:
    sources = source if isinstance(source, list) else [source]
    defaults = {"precision": "fp32", "storage": "fp32", "size": (32, 32), "batch_size": 4}
    return encode([SourceConfig(path=path) for path in sources], EncodeOptions(output, **{**defaults, **options}))


def content(root: Path, *, raw: bool = True) -> dict[str, np.ndarray]:
    store = DatasetStore.open(root)
    return {key: np.array(store.read(key, raw=raw)) for key in store.keys()}


def same(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> bool:
    return a.keys() == b.keys() and all(np.array_equal(a[key], b[key]) for key in a)
