"""measured.json in a run's folder: what a step takes from latents, in fp32 and from pixels, and what follows of it."""

from __future__ import annotations

import json
import warnings
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from halfstep.files import write_durably
from halfstep.machine import device_name
from halfstep.models import About
from halfstep.precision import PrecisionPolicy
from halfstep.precision.policy import STORAGE_TYPES
from halfstep.train.config import TrainConfig
from halfstep.train.data import TrainingData

NAME = "measured.json"

# The settings, besides the network's own, that decide what a step takes.
_SETTINGS = frozenset({"activation_budget", "compile", "fsdp", "gradient_accumulation_steps"})
_SAVED = {"speedup", "memory"}


@dataclass(frozen=True)
class Case:
    """Medians over processes, which timed `steps` steps in all, and the `smallest` and `largest` seconds of a step.
    Memory, in MB, is the most that a process held."""

    seconds_per_step: float
    smallest: float
    largest: float
    samples_per_second: float
    peak_memory_mb: float
    steps: int


@dataclass(frozen=True)
class Measured:
    """What was measured: `cases` by name, which hold for a training of these `conditions`. `against_fp32` and
    `against_pixels`: how many times as fast the run's own way is ("speedup"), and its share of the other's "memory";
    None where the run's own precision is fp32."""

    conditions: dict[str, Any]
    machine: dict[str, Any]
    data: dict[str, Any]
    cases: dict[str, Case]
    against_fp32: dict[str, float] | None
    against_pixels: dict[str, float]

    def write(self, run: Path) -> None:
        write_durably(run / NAME, json.dumps(asdict(self), indent=1).encode())


def types_of(policy: PrecisionPolicy) -> str:
    """A policy as it prints with the type of files that its name implies: a training step has no files."""
    return min((str(replace(policy, storage=storage)) for storage in STORAGE_TYPES), key=len)


def conditions(
    config: TrainConfig, about: About, data: TrainingData, policy: PrecisionPolicy, device: torch.device, processes: int
) -> dict[str, Any]:
    """What the time and the memory of a step depend on, as JSON gives it back."""
    values = {
        "device": device_name(device),
        "policy": types_of(policy),
        "batch": data.items_per_step,
        "processes": processes,
        "network": about.network,
        "arguments": about.config,
        "settings": config.model_dump(mode="json", include={*_SETTINGS, *config.family.settings}),
    }
    same: dict[str, Any] = json.loads(json.dumps(values))
    return same


def saving(ours: Case, other: Case) -> dict[str, float]:
    """How many times as fast as the other one ours is, and its share of the other's memory."""
    return {
        "speedup": round(other.seconds_per_step / ours.seconds_per_step, 2),
        "memory": round(ours.peak_memory_mb / other.peak_memory_mb, 2),
    }


def read_measured(run: Path) -> dict[str, Any] | None:
    """What was measured for a run, as it was written, or None; a file that cannot be read is warned about."""
    path = run / NAME
    if not path.exists():
        return None
    try:
        content = json.loads(path.read_text())
        against = content["against_fp32"]
        if not isinstance(content["conditions"], dict) or (against is not None and set(against) != _SAVED):
            raise ValueError("not what --measure writes")
    except (OSError, ValueError, KeyError, TypeError) as error:
        warnings.warn(f"{path}: not a readable measurement ({error}); measure again", stacklevel=2)
        return None
    found: dict[str, Any] = content
    return found


def against_fp32(measured: dict[str, Any] | None, now: dict[str, Any]) -> dict[str, float] | None:
    """What precision saves under the conditions of `now`; None where it was measured under others, or not at all."""
    if measured is None or measured["conditions"] != now:
        return None
    found: dict[str, float] | None = measured["against_fp32"]
    return found
