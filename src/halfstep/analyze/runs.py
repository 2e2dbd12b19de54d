"""A run as it was analyzed."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from halfstep.analyze.metrics import Path
from halfstep.store.run import Float64


@dataclass(frozen=True)
class AnalyzedRun:
    """One run: who it is, its path, `metrics` by name with their `resolution` (what the rounding of the stored states
    could have made of each), and `profiles` along the path as (sigmas, values). `facts`: how it was made."""

    key: str
    prompt: str | None
    seed: int | None
    group: str
    path: Path
    metrics: dict[str, float]
    resolution: dict[str, float]
    profiles: dict[str, tuple[Float64, Float64]]
    spectrum: Float64
    problems: tuple[str, ...]
    facts: dict[str, Any] = field(default_factory=dict)
    comparable: bool = True  # has the noise levels, and the kind of states, that most runs have
