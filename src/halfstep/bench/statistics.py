"""halfstep bench statistics: how often `analyze` finds what is not there, and what is, by design of the comparison."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from halfstep.analyze import analyze
from halfstep.bench.compare import document
from halfstep.progress import SILENT, Progress
from halfstep.sampling.toy_flow import ToyFlow, smooth_field
from halfstep.store.run import Float32, Latents, Run

_SHAPE = (4, 8, 8)
_STEPS = 12
_ALPHA = 0.05


@dataclass(frozen=True)
class Design:
    """How many runs each group has, and whether all groups have the same seeds."""

    sizes: tuple[int, ...]
    paired: bool


@dataclass(frozen=True)
class Change:
    """What makes the last group another one than the others: how widely its prompts lie, and how far from zero."""

    spread: float = 1.0
    distance: float = 1.0


@dataclass
class Counts:
    """Over sets of runs: p-values below 0.05 by quantity, of all that were had; sets with a finding after correction,
    and the quantities found in them."""

    below: Counter[str] = field(default_factory=Counter)
    tested: Counter[str] = field(default_factory=Counter)
    sets_with_finding: int = 0
    found: Counter[str] = field(default_factory=Counter)
    sets: int = 0


DESIGNS = {
    "paired, 10 + 10": Design((10, 10), True),
    "unpaired, 10 + 10": Design((10, 10), False),
    "unequal, 6 + 18": Design((6, 18), False),
    "six groups of 8, paired": Design((8,) * 6, True),
    "six groups of 8, unpaired": Design((8,) * 6, False),
}
CHANGES = {
    "none": Change(),
    "prompts twice as wide": Change(spread=2.0),
    "results 10% farther": Change(distance=1.1),
}


def bench_statistics(*, sets: int = 300, progress: Progress = SILENT) -> dict[str, Any]:
    """Analyze `sets` sets of simulated runs for each design, without a difference between the groups and with two: a
    closed-form flow from noise to results, each run with a prompt of its own that lies at random around the group's."""
    results: dict[str, Any] = {}
    progress.start(sets * len(DESIGNS) * len(CHANGES))
    for name, design in DESIGNS.items():
        for change_name, change in CHANGES.items():
            counts = Counts()
            for number in range(sets):
                progress.advance()
                runs, groups = simulated(design, change, number)
                _count(counts, runs, groups)
            results.setdefault(name, {})[change_name] = _shares(counts)
            progress.show(f"{name}, {change_name}: {counts.sets_with_finding} of {sets} sets with a finding")
    return document("statistics", {}, sets=sets, alpha=_ALPHA, designs=results)


def simulated(design: Design, change: Change, number: int) -> tuple[dict[str, Run], dict[str, str]]:
    """Runs, and the group of each. `number` seeds all that is random in the set."""
    world = torch.Generator().manual_seed(number)
    centers = torch.stack([smooth_field(_SHAPE, world) for _ in range(2)])
    runs: dict[str, Run] = {}
    groups: dict[str, str] = {}
    last = len(design.sizes) - 1
    seed = 0
    for g, size in enumerate(design.sizes):
        this = change if g == last else Change()
        for k in range(size):
            prompt = 0.3 * this.spread * torch.stack([smooth_field(_SHAPE, world) for _ in centers])
            flow = ToyFlow(this.distance * (centers + prompt), spread=0.3)
            key = f"{g}-{k}"
            runs[key] = _run(key, flow, number * 1000 + (k if design.paired else seed))
            groups[key] = f"group {g}"
            seed += 1
    return runs, groups


def _run(key: str, flow: ToyFlow, seed: int) -> Run:
    states = list(flow.sample(seed, steps=_STEPS))
    latents = [state.latents[0].numpy() for state in states]
    sigmas, timesteps = (np.array([getattr(state, name) for state in states]) for name in ("sigma", "timestep"))
    read: Callable[[int], Float32] = latents.__getitem__
    kept = Latents(len(latents), _SHAPE, read)
    return Run(key, np.arange(len(latents)), timesteps, sigmas, kept, None, seed, {}, ())


def _count(counts: Counts, runs: Mapping[str, Run], groups: Mapping[str, str]) -> None:
    analysis = analyze(runs, groups)
    counts.sets += 1
    first = analysis.omnibus or analysis.tests
    for test in first:
        if test.p is not None:
            counts.tested[test.metric] += 1
            counts.below[test.metric] += test.p < _ALPHA
    found = {test.metric for test in first if test.verdict == "different"}
    separated = any(level.p_corrected is not None and level.p_corrected < _ALPHA for level in analysis.separations)
    counts.sets_with_finding += bool(found)
    counts.found.update(found)
    counts.found["separation"] += separated
    pair = any(test.verdict == "different" for test in analysis.tests) if analysis.omnibus else False
    counts.found["a pair of groups"] += pair


def _shares(counts: Counts) -> dict[str, Any]:
    return {
        "below_alpha": {name: round(counts.below[name] / total, 4) for name, total in counts.tested.items()},
        "found": {name: round(counts.found[name] / counts.sets, 4) for name in [*counts.tested, "separation",
                                                                               "a pair of groups"]},
        "sets_with_a_finding": round(counts.sets_with_finding / counts.sets, 4),
    }  # fmt: skip
