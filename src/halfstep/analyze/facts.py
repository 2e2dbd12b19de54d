"""How runs were made, as far as their stores say it: what has to be the same before they are compared."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from halfstep.analyze.runs import AnalyzedRun
from halfstep.errors import some
from halfstep.store.run import Run

_MOST_VALUES = 4  # of a fact that are listed


def facts_of(run: Run) -> dict[str, Any]:
    """What is known of how `run` was made, by name, in words or numbers."""
    known = run.attributes
    size = [known[name] for name in ("width", "height", "frames") if known.get(name) is not None]
    facts: dict[str, Any] = {
        "model": known.get("model"),
        "pipeline": known.get("pipeline"),
        "scheduler": known.get("scheduler"),
        "scheduler settings": _pairs(known.get("scheduler_settings")),
        "states": known.get("states"),
        "stored states": len(run),
        "steps": known.get("steps"),
        "guidance": known.get("guidance"),
        "negative prompt": known.get("negative_prompt"),
        "size": " x ".join(map(str, size)) if size else None,
        "latent shape": " x ".join(map(str, run.latents.shape[1:])),
        "precision": known.get("policy"),
        "type of the latents": known.get("dtype"),
        "kept as": known.get("latents_format"),
        "device": known.get("device"),
        "versions": _pairs(known.get("versions")),
        "date": str(known["recorded"])[:10] if known.get("recorded") else None,
    }
    return {
        name: value if isinstance(value, (str, int, float)) else json.dumps(value)
        for name, value in facts.items()
        if value is not None
    }


def _pairs(content: Any) -> str | None:
    if not isinstance(content, dict):
        return None
    return ", ".join(f"{name} {value}" for name, value in sorted(content.items()))


def listed(values: Counter[str]) -> str:
    """Values of a fact and how many runs have each."""
    if len(values) == 1:
        return next(iter(values))
    parts = [f"{value} ({count} runs)" for value, count in values.most_common(_MOST_VALUES)]
    return "; ".join(parts) + (f"; {len(values) - _MOST_VALUES} more" if len(values) > _MOST_VALUES else "")


def table(runs: Sequence[AnalyzedRun]) -> dict[str, Counter[str]]:
    """Each fact that is known of any run: its values, and how many runs have them."""
    found: dict[str, Counter[str]] = {}
    for run in runs:
        for name, value in run.facts.items():
            found.setdefault(name, Counter())[str(value)] += 1
    return found


def differences(runs: Sequence[AnalyzedRun]) -> list[str]:
    """A line for each fact in which runs that are compared differ: between groups, the fact may be the cause of what
    differs there; within groups, it adds to their spread."""
    lines = []
    for name, values in table(runs).items():
        if name == "date" or len(values) < 2:
            continue
        by_group: dict[str, set[str]] = {}
        for run in runs:
            if name in run.facts:
                by_group.setdefault(run.group, set()).add(str(run.facts[name]))
        between = len(by_group) > 1 and all(len(found) == 1 for found in by_group.values())
        what = "what differs between groups may come from it" if between else "it adds to the spread within groups"
        lines.append(f"not all runs have the same {name}: {listed(values)}; {what}")
    return lines


def mark_comparable(runs: Sequence[AnalyzedRun], problems: list[str]) -> list[AnalyzedRun]:
    """Runs are compared at equal noise levels only, nothing is interpolated, and only where a noise level means the
    same: those that are not as most runs are left out of comparisons."""
    marked = _as_most(runs, problems, lambda run: run.facts.get("states"),
                      lambda run, usual: f"its states are {run.facts['states']}, most runs' {usual}")  # fmt: skip
    return _as_most(
        marked,
        problems,
        _levels,
        lambda run, _: f"its {len(run.path.sigmas)} noise levels differ from most runs'",
    )


def _as_most(
    runs: Sequence[AnalyzedRun],
    problems: list[str],
    of: Callable[[AnalyzedRun], Any],
    reason: Callable[[AnalyzedRun, Any], str],
) -> list[AnalyzedRun]:
    counted = Counter(of(run) for run in runs if run.comparable and of(run) is not None)
    if len(counted) < 2:
        return list(runs)
    usual = counted.most_common(1)[0][0]
    others = [run for run in runs if run.comparable and of(run) not in (usual, None)]
    by_reason: dict[str, list[str]] = {}
    for run in others:
        by_reason.setdefault(reason(run, usual), []).append(run.key)
    problems += [f"{some(keys)}: {line}; not compared" for line, keys in by_reason.items()]
    left_out = {run.key for run in others}
    return [replace(run, comparable=False) if run.key in left_out else run for run in runs]


def _levels(run: AnalyzedRun) -> tuple[float, ...]:
    return tuple(float(f"{sigma:.4g}") for sigma in run.path.sigmas)
