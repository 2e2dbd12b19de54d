"""The gate: is B slower than A by more than a tolerance, as far as pairs of blocks can say?

A block is a number of calls, a pair one block of A and one of B, whose order alternates. What decides is the median of
the logarithms of B's cost over A's. Noise comes in bursts: it spoils whole stretches of pairs, which move a mean and
not a median (in simulated bursts the mean left 7 to 44 of 100 comparisons undecided after 96 pairs, the median 0 to 3).
The median's interval is a moving block bootstrap (Künsch 1989, Ann. Statist. 17:1217) of pairs in stretches of 1, 2 and
4, the widest of the three: long stretches alone are too few for their tails, single pairs alone miss what neighbors
share. Neighbors share their processes, too: where things lie in memory makes two processes of the same code differ by
percents (Mytkowicz et al. 2009, doi:10.1145/1508244.1508275), so both sides begin anew after four pairs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from halfstep.statistics import holm

Verdict = Literal["fine", "slower", "undecided"]
Float64 = npt.NDArray[np.float64]

TOLERANCE = 0.05
SESSION_PAIRS = 4
# Pairs after which a decision is tried. Trying several times costs error rate: each may err by its share of it alone.
LOOKS = (16, 32, 64, 128)
NOTHING = "nothing measured"
EXIT_CODES: dict[str, int] = {"fine": 0, "slower": 1, NOTHING: 2, "undecided": 3}

_ERROR = 0.005  # of a verdict, over all looks: one side of an interval at 99%
_STRETCHES = (1, 2, SESSION_PAIRS)
_FEWEST_RESAMPLES = 8000
_SEED = 0


@dataclass(frozen=True)
class Evidence:
    """What so many pairs say of B's cost as a multiple of A's.

    `low` to `high` is the interval that has to lie on one side of 1 + tolerance, at 99% over all looks together.
    `p_slower` and `p_fine` are the chances of such pairs where B is within the tolerance, and where it is not; they
    count all looks.
    """

    pairs: int
    ratio: float
    low: float
    high: float
    p_slower: float
    p_fine: float


def run_pairs(a: Callable[[], float], b: Callable[[], float]) -> list[float]:
    """The log ratios of a session: pairs of blocks of A and B, which return what they cost, in alternating order."""
    log_ratios = []
    for number in range(SESSION_PAIRS):
        if number % 2:
            cost_b, cost_a = b(), a()
        else:
            cost_a, cost_b = a(), b()
        log_ratios.append(math.log(cost_b / cost_a))
    return log_ratios


def compare(
    session: Callable[[], Sequence[float]], *, tolerance: float = TOLERANCE, cases: int = 1
) -> tuple[Evidence, list[float]]:
    """Hold sessions, which begin A and B anew and give the log ratios of their pairs, until these decide or there are
    128; the evidence, and all log ratios. `cases`: how many comparisons are judged together."""
    log_ratios: list[float] = []
    for look in LOOKS:
        while len(log_ratios) < look:
            log_ratios += session()
        found = evidence(log_ratios, tolerance=tolerance, cases=cases)
        if _decides(found, cases):
            break
    return found, log_ratios


def evidence(log_ratios: Sequence[float], *, tolerance: float = TOLERANCE, cases: int = 1) -> Evidence:
    """The evidence of at least four pairs. The same pairs give the same."""
    values, limit = np.asarray(log_ratios, float), math.log1p(tolerance)
    rng = np.random.default_rng(_SEED)
    drawn = [_medians(values, stretch, _resamples(cases), rng) for stretch in _STRETCHES]
    tail = _ERROR / len(LOOKS)

    def chance(beyond: Callable[[Float64], npt.NDArray[np.bool_]]) -> float:
        largest = max((1 + int(beyond(medians).sum())) / (1 + len(medians)) for medians in drawn)
        return min(1.0, len(LOOKS) * largest)

    return Evidence(
        pairs=len(values),
        ratio=math.exp(float(np.median(values))),
        low=math.exp(min(float(np.quantile(medians, tail)) for medians in drawn)),
        high=math.exp(max(float(np.quantile(medians, 1 - tail)) for medians in drawn)),
        p_slower=chance(lambda medians: medians <= limit),
        p_fine=chance(lambda medians: medians >= limit),
    )


def verdicts(found: Sequence[Evidence]) -> list[Verdict]:
    """Of comparisons that are judged together: "slower" is corrected for their number after Holm."""
    corrected = holm(np.array([one.p_slower for one in found], float))
    return [_verdict(p, one.p_fine) for p, one in zip(corrected, found, strict=True)]


def can_tell(log_ratios: Sequence[float], *, tolerance: float = TOLERANCE) -> bool:
    """Whether a comparison of something with itself calls neither of the two slower. If it does, no verdict counts."""
    both = (evidence(log_ratios, tolerance=tolerance), evidence([-x for x in log_ratios], tolerance=tolerance))
    return all(verdicts([one]) != ["slower"] for one in both)


def overall(found: Sequence[Verdict]) -> Verdict:
    """One verdict for all: slower where one is, else undecided where one is, else fine."""
    if "slower" in found:
        return "slower"
    return "undecided" if "undecided" in found else "fine"


def _verdict(p_slower: float, p_fine: float) -> Verdict:
    if p_slower <= _ERROR:
        return "slower"
    return "fine" if p_fine <= _ERROR else "undecided"


def _decides(found: Evidence, cases: int) -> bool:
    """Whether the verdict will stand: the strictest step of Holm multiplies by the number of cases."""
    return cases * found.p_slower <= _ERROR or found.p_fine <= _ERROR


def _resamples(cases: int) -> int:
    """So many that the smallest p-value they can give is a quarter of what the strictest step of Holm asks for."""
    return max(_FEWEST_RESAMPLES, math.ceil(4 * len(LOOKS) * cases / _ERROR))


def _medians(values: Float64, stretch: int, resamples: int, rng: np.random.Generator) -> Float64:
    """Medians [resamples] of as many pairs as there are, drawn in stretches of neighbors."""
    stretches = np.lib.stride_tricks.sliding_window_view(values, stretch)
    drawn = []
    rows = max(1, (1 << 20) // len(values))
    for start in range(0, resamples, rows):
        chosen = rng.integers(len(stretches), size=(min(rows, resamples - start), -(-len(values) // stretch)))
        drawn.append(np.median(stretches[chosen].reshape(len(chosen), -1)[:, : len(values)], axis=1))
    return np.concatenate(drawn)
