"""What came of a run: counts of one process and of all, and the failures by name."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from halfstep.data.base import FrameSequence, Problem
from halfstep.data.keys import name_to_key
from halfstep.errors import HalfstepError


@dataclass(frozen=True)
class Failure:
    """One line of failures.jsonl. Paths in it that are not UTF-8 are escaped as keys are."""

    key: str
    source: str
    reason: str
    frame: int | None = None

    @classmethod
    def of(cls, sequence: FrameSequence, problem: Problem) -> Failure:
        return cls(sequence.key, name_to_key(str(sequence.source)), name_to_key(problem.reason), problem.frame)


@dataclass
class Counts:
    """What one process did, in items: `retried` in fp32, `refused` because they are not finite there either. By
    sequence, `left_out` counts the frames that make no whole clip, and `unused` those beyond the first of an animation
    whose first frame alone is wanted."""

    encoded: int = 0
    skipped: int = 0
    retried: int = 0
    refused: int = 0
    failures: list[Failure] = field(default_factory=list)
    left_out: dict[str, int] = field(default_factory=dict)
    unused: dict[str, int] = field(default_factory=dict)


class StoppedError(HalfstepError):
    """--strict met a failure. `failures` are those up to then."""

    def __init__(self, line: str, failures: Sequence[Failure] = ()) -> None:
        super().__init__(line)
        self.failures = list(failures)


def merge_counts(parts: list[Counts]) -> Counts:
    return Counts(
        sum(c.encoded for c in parts),
        sum(c.skipped for c in parts),
        sum(c.retried for c in parts),
        sum(c.refused for c in parts),
        [failure for c in parts for failure in c.failures],
        {key: frames for c in parts for key, frames in c.left_out.items()},
        {key: frames for c in parts for key, frames in c.unused.items()},
    )
