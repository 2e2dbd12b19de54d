"""Cases against each other, in processes of their own that take turns; and the baseline against itself."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from halfstep.bench.cases import Case
from halfstep.bench.gate import (
    NOTHING,
    SESSION_PAIRS,
    TOLERANCE,
    Evidence,
    can_tell,
    compare,
    overall,
    run_pairs,
    verdicts,
)
from halfstep.bench.memory import ENVIRONMENT
from halfstep.bench.timing import BLOCK_S, Block, summary
from halfstep.bench.worker import OURS, AbsentError, Worker, WorkerError
from halfstep.progress import SILENT, Progress


@dataclass
class Side:
    """A case, the folder of the package that it is measured with, and the blocks that were measured. `where` tells two
    sides of one case apart in errors."""

    case: Case
    source: Path = OURS
    where: str = ""
    blocks: list[Block] = field(default_factory=list)

    def open(self, environment: Mapping[str, str] | None = None) -> Worker:
        name = f"{self.where}: {self.case.name}" if self.where else self.case.name
        return Worker(self.case, self.source, environment, name=name)

    def run(self, worker: Worker) -> float:
        """A block; its cost."""
        self.blocks.append(worker.block())
        return self.blocks[-1].cost_s

    def row(self) -> dict[str, Any]:
        """The figures of one call, the most memory of it (MB, with what was held before) and the switches; these in a
        fresh process. Raises WorkerError when it fails."""
        with self.open(ENVIRONMENT) as worker:
            worker.ready()
            switches, missing, peak = worker.switches(), worker.energy_missing(), worker.peak()
        return {
            **summary(self.blocks),
            "energy_missing": missing,
            "peak_memory_mb": round(peak.peak_mb, 1),
            "held_memory_mb": round(peak.held_mb, 1),
            "switches": switches,
        }


@dataclass
class Outcome:
    """What comparisons came to by name: `found` has the evidence, the log ratios and the verdict of each; `absent` and
    `failed` say why there is none."""

    found: dict[str, dict[str, Any]] = field(default_factory=dict)
    absent: dict[str, str] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)

    def verdict(self, canary: Mapping[str, Any] | None) -> str:
        """One for all; undecided when the canary says that nobody could tell."""
        if canary is None:
            return NOTHING
        return overall([one["verdict"] for one in self.found.values()]) if canary["can_tell"] else "undecided"


def race(
    a: Side, b: Side, *, block_s: float = BLOCK_S, tolerance: float = TOLERANCE, cases: int = 1
) -> tuple[Evidence, list[float]]:
    """Compare B's case with A's, the baseline, as `gate.compare` does. Raises WorkerError for the one that fails."""
    counts: list[int] = []

    def session() -> list[float]:
        with a.open() as worker_a, b.open() as worker_b:
            worker_a.ready()
            worker_b.ready()
            if counts:
                worker_a.take(counts[0])
            else:
                counts.append(worker_a.calibrate(block_s))
            worker_b.take(counts[0])
            return run_pairs(lambda: a.run(worker_a), lambda: b.run(worker_b))

    return compare(session, tolerance=tolerance, cases=cases)


def race_all(
    pairs: Mapping[str, tuple[Side, Side]], *, tolerance: float = TOLERANCE, progress: Progress = SILENT
) -> Outcome:
    """Every B against its A, judged together. One that fails is named, and the others go on."""
    outcome = Outcome()
    races: dict[str, tuple[Evidence, list[float]]] = {}
    for name, (a, b) in pairs.items():
        progress.show(name)
        try:
            races[name] = race(a, b, tolerance=tolerance, cases=len(pairs))
        except AbsentError as error:
            outcome.absent[name] = str(error)
        except WorkerError as error:
            outcome.failed[name] = str(error)
        progress.advance()
    judged = verdicts([found for found, _ in races.values()])
    for (name, (found, log_ratios)), verdict in zip(races.items(), judged, strict=True):
        outcome.found[name] = _told(found, log_ratios, verdict)
    return outcome


def race_with_itself(side: Side, *, tolerance: float = TOLERANCE) -> dict[str, Any]:
    """The canary: a baseline against itself through the same machinery. Where it `can_tell` not, no verdict counts."""
    a, b = (Side(side.case, side.source, side.where) for _ in range(2))
    found, log_ratios = race(a, b, tolerance=tolerance)
    told = _told(found, log_ratios, verdicts([found])[0])
    return {"case": side.case.name, **told, "can_tell": can_tell(log_ratios, tolerance=tolerance)}


def alone(side: Side) -> None:
    """Measure a case that there is nothing to compare with."""
    for _ in range(SESSION_PAIRS):
        with side.open() as worker:
            worker.ready()
            worker.calibrate(BLOCK_S)
            for _ in range(SESSION_PAIRS):
                side.run(worker)


def _told(found: Evidence, log_ratios: list[float], verdict: str) -> dict[str, Any]:
    figures = {name: float(f"{value:.4g}") for name, value in asdict(found).items() if name != "pairs"}
    return {
        "verdict": verdict,
        "pairs": found.pairs,
        **figures,
        "log_ratios": [round(value, 5) for value in log_ratios],
    }
