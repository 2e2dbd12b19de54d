"""halfstep bench suite: models and verbs at several sizes, each precision against fp32."""

from __future__ import annotations

import difflib
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from halfstep.bench.cases import SUITE, Case
from halfstep.bench.compare import document
from halfstep.bench.facts import machine
from halfstep.bench.gate import TOLERANCE
from halfstep.bench.race import Side, alone, race_all, race_with_itself
from halfstep.bench.timing import BLOCK_S
from halfstep.bench.worker import WorkerError
from halfstep.errors import InputError
from halfstep.machine import open_device
from halfstep.precision import PRESETS, PrecisionPolicy, Settled, settle
from halfstep.progress import SILENT, Progress

FORMAT = 1  # of the documents of suites and comparisons


@dataclass(frozen=True)
class Group:
    """A workload at one size in fp32, and in the other precisions that are held against it."""

    baseline: Case
    others: tuple[Case, ...]


def bench_suite(
    *,
    models: Sequence[str] = (),
    sizes: Sequence[int] = (),
    precisions: Sequence[str] = (),
    device: str = "auto",
    tolerance: float = TOLERANCE,
    progress: Progress = SILENT,
) -> dict[str, Any]:
    """Measure `models` (by default all there are) at `sizes` (theirs) in `precisions` (fp32 and `auto`'s choice).

    A row a case; in another precision than fp32 it has `against`: the gate's verdict against fp32, in pairs of blocks.
    The canary is the first baseline against itself. On a CPU each process computes in one thread. A case that fails is
    named in `failed`. Raises InputError for what is not known.
    """
    groups, notes = groups_of(models, sizes, precisions, device)
    for note in notes:
        progress.note(note)
    sides = {case: Side(case) for group in groups for case in (group.baseline, *group.others)}
    pairs = {case.name: (sides[group.baseline], sides[case]) for group in groups for case in group.others}
    progress.start(len(pairs) + len(sides))
    outcome = race_all(pairs, tolerance=tolerance, progress=progress)
    rows: list[dict[str, Any]] = []
    canary = None
    for case, side in sides.items():
        progress.show(case.name)
        progress.advance()
        if case.name in pairs and case.name not in outcome.found:
            continue
        try:
            if not side.blocks:
                alone(side)
            row = _row(case, side.row())
            if canary is None:
                canary = race_with_itself(side, tolerance=tolerance)
        except WorkerError as error:
            outcome.failed[case.name] = str(error)
            continue
        rows.append({**row, "against": outcome.found.get(case.name)})
    return document(
        "suite",
        {},
        format=FORMAT,
        machine=machine(device),
        tolerance=tolerance,
        block_s=BLOCK_S,
        verdict=outcome.verdict(canary),
        canary=canary,
        rows=rows,
        failed={**outcome.absent, **outcome.failed},
        notes=notes,
    )


def groups_of(
    models: Sequence[str], sizes: Sequence[int], precisions: Sequence[str], device: str
) -> tuple[list[Group], list[str]]:
    """The cases that are asked for, where nothing means all, and what the user should know of the precisions."""
    target = open_device(device)
    place = str(target)
    if target.type == "cuda" and target.index is None:
        place = f"cuda:{torch.cuda.current_device()}"
    for name in models:
        if name not in SUITE:
            raise InputError(f"--models: got {name!r}; expected one of {', '.join(SUITE)}{_nearest(name, SUITE)}")
    groups, notes = [], []
    with _one_thread(target):
        for name in models or SUITE:
            for precision in precisions:
                said = _settle(precision, target, SUITE[name].task).notes
                notes += [line for line in said if line not in notes]
            for size in sizes or SUITE[name].sizes:
                wanted = [Case(name, size, precision, place) for precision in precisions or ("fp32", "auto")]
                policies = dict.fromkeys(map(_chosen, wanted))
                others = [str(policy) for policy in policies if (policy.params, policy.compute) != ("fp32", "fp32")]
                group = tuple(Case(name, size, policy, place) for policy in others)
                groups.append(Group(Case(name, size, "fp32", place), group))
    return groups, notes


def _chosen(case: Case) -> PrecisionPolicy:
    policy = PrecisionPolicy.parse(case.precision)
    if not policy.is_auto:
        return policy
    with tempfile.TemporaryDirectory(prefix="halfstep-bench-") as scratch:
        return case.chosen(Path(scratch))


@contextmanager
def _one_thread(device: torch.device) -> Iterator[None]:
    """As in the processes that measure on a CPU."""
    before = torch.get_num_threads()
    try:
        if device.type == "cpu":
            torch.set_num_threads(1)
        yield
    finally:
        torch.set_num_threads(before)


def _settle(precision: str, device: torch.device, task: str) -> Settled:
    try:
        return settle(precision, device, task)
    except InputError as error:
        raise InputError(f"--precisions: {error}{_nearest(precision.partition(',')[0], PRESETS)}") from error


def _nearest(name: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.4)
    return f"; nearest is {near[0]}" if near and near[0] != name else ""


def _row(case: Case, figures: dict[str, Any]) -> dict[str, Any]:
    return {
        "case": case.name,
        "workload": case.workload,
        "size": case.size,
        "precision": case.precision,
        "device": case.device,
        **figures,
    }
