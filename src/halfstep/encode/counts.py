"""What came of a run: the books of one process and of all, and the failures by name."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from halfstep.data.base import FrameSequence, Problem
from halfstep.data.keys import name_to_key
from halfstep.engine.ledger import Balance
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
    """What one process did. `balance` counts items; a sequence that cannot be read at all is one. Of those refused
    `not_finite` are not so in fp32 either. By sequence, `left_out` counts the frames that make no whole clip, and
    `unused` those beyond the first of an animation whose first frame alone is wanted."""

    balance: Balance = field(default_factory=Balance)
    not_finite: int = 0
    failures: list[Failure] = field(default_factory=list)
    left_out: dict[str, int] = field(default_factory=dict)
    unused: dict[str, int] = field(default_factory=dict)


class StoppedError(HalfstepError):
    """--strict met a failure. `failures` are those up to then."""

    def __init__(self, line: str, failures: Sequence[Failure] = ()) -> None:
        super().__init__(line)
        self.failures = list(failures)

    def __reduce__(self) -> tuple[type[StoppedError], tuple[str, list[Failure]]]:
        return StoppedError, (str(self), self.failures)


def merge_counts(parts: list[Counts]) -> Counts:
    return Counts(
        Balance.total([c.balance for c in parts]),
        sum(c.not_finite for c in parts),
        [failure for c in parts for failure in c.failures],
        {key: frames for c in parts for key, frames in c.left_out.items()},
        {key: frames for c in parts for key, frames in c.unused.items()},
    )
