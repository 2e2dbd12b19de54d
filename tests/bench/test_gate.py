"""The gate: its chances against plain enumeration, its verdicts on noise in bursts, what it does with many cases."""

import itertools
import math
import statistics
from collections.abc import Callable, Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from halfstep.bench.gate import (
    LOOKS,
    SESSION_PAIRS,
    Evidence,
    can_tell,
    compare,
    evidence,
    overall,
    run_pairs,
    verdicts,
)

LIMIT = math.log(1.05)
TEN_PERCENT = math.log(1.1)


def bursts(rng: np.random.Generator, blocks: int) -> np.ndarray:
    """The log cost of blocks where a neighbor comes for eight blocks and goes for thirty, on average, and takes up to
    60% meanwhile."""
    busy, now = [], False
    for _ in range(blocks):
        now ^= rng.random() < (1 / 8 if now else 1 / 30)
        busy.append(now)
    return rng.normal(0, 0.01, blocks) + np.array(busy) * np.log1p(rng.uniform(0, 0.6, blocks))


def processes(rng: np.random.Generator, blocks: int) -> np.ndarray:
    """Blocks whose process makes them a few percent slower or faster, all of a session alike."""
    of_sides = rng.normal(0, 0.02, (blocks // (2 * SESSION_PAIRS), 2))
    return rng.normal(0, 0.015, blocks) + np.tile(of_sides, SESSION_PAIRS).reshape(-1)


def spikes(rng: np.random.Generator, blocks: int) -> np.ndarray:
    """One block in twelve takes up to several times as long."""
    return rng.normal(0, 0.015, blocks) + (rng.random(blocks) < 0.08) * np.log1p(rng.exponential(0.8, blocks))


def sessions(noise: np.ndarray, difference: float) -> Iterator[list[float]]:
    """The log ratios of sessions in which B costs so much more, in log, and all blocks have that noise in turn."""
    costs = iter(noise.tolist())
    while True:
        yield run_pairs(lambda: math.exp(next(costs)), lambda: math.exp(next(costs) + difference))


def judged(noise: Callable[[np.random.Generator, int], np.ndarray], difference: float, trials: int) -> list[str]:
    found = []
    for seed in range(trials):
        held = sessions(noise(np.random.default_rng(seed), 2 * LOOKS[-1]), difference)
        found.append(verdicts([compare(lambda held=held: next(held))[0]])[0])
    return found


@pytest.mark.slow
@pytest.mark.parametrize("noise", [bursts, processes, spikes])
def test_noise_is_never_called_slower_and_ten_percent_never_fine(
    noise: Callable[[np.random.Generator, int], np.ndarray],
) -> None:
    same, more = judged(noise, 0.0, 20), judged(noise, TEN_PERCENT, 20)
    assert "slower" not in same and same.count("fine") >= 19
    assert "fine" not in more and more.count("slower") >= 19


def test_at_the_tolerance_itself_there_is_no_verdict() -> None:
    assert judged(bursts, LIMIT, 8).count("undecided") >= 7


@given(st.lists(st.floats(-0.2, 0.2), min_size=4, max_size=5))
@settings(max_examples=20, deadline=None)
def test_chances_are_those_of_all_resamples(log_ratios: list[float]) -> None:
    """Of each stretch all resamples are as likely; the least favorable stretch counts, four looks share the error."""
    found = evidence(log_ratios)
    n = len(log_ratios)
    above, below = [], []
    for stretch in (1, 2, 4):
        parts = [log_ratios[i : i + stretch] for i in range(n - stretch + 1)]
        drawn = itertools.product(parts, repeat=-(-n // stretch))
        medians = [statistics.median(list(itertools.chain(*chosen))[:n]) for chosen in drawn]
        above.append(sum(median >= LIMIT for median in medians) / len(medians))
        below.append(sum(median <= LIMIT for median in medians) / len(medians))
    assert found.p_slower == pytest.approx(min(1, 4 * max(below)), abs=0.1)
    assert found.p_fine == pytest.approx(min(1, 4 * max(above)), abs=0.1)
    assert found.ratio == pytest.approx(math.exp(statistics.median(log_ratios)))
    assert found.low <= found.ratio * (1 + 1e-9) and found.ratio <= found.high * (1 + 1e-9)


def test_golden_numbers() -> None:
    log_ratios = np.random.default_rng(7).normal(0.03, 0.04, 32).tolist()
    found = evidence(log_ratios)
    assert found.pairs == 32
    assert (found.ratio, found.low, found.high) == pytest.approx((1.0155434, 0.9795149, 1.0351355), abs=1e-6)
    assert (found.p_slower, found.p_fine) == pytest.approx((1.0, 4 / 8001), rel=1e-6)
    assert evidence(log_ratios) == found


def test_blocks_alternate() -> None:
    order: list[str] = []

    def side(name: str, cost: float) -> Callable[[], float]:
        return lambda: order.append(name) or cost

    assert run_pairs(side("a", 2.0), side("b", 4.0)) == pytest.approx([math.log(2)] * 4)
    assert "".join(order) == "abbaabba"


def test_it_stops_when_it_is_decided_and_gives_up_in_the_end() -> None:
    found, log_ratios = compare(lambda: [0.2] * SESSION_PAIRS)
    assert found.pairs == len(log_ratios) == LOOKS[0]
    found, log_ratios = compare(lambda: [LIMIT - 0.1, LIMIT + 0.1] * 2)
    assert found.pairs == len(log_ratios) == LOOKS[-1]
    assert verdicts([found]) == ["undecided"]
    assert found.low < 1.05 < found.high


def shown(p_slower: float, p_fine: float = 1.0) -> Evidence:
    return Evidence(16, 1.1, 1.0, 1.2, p_slower, p_fine)


def test_slower_is_corrected_for_the_number_of_cases() -> None:
    assert verdicts([shown(0.004)]) == ["slower"]
    assert verdicts([shown(0.004), *[shown(1.0, 0.001)] * 9]) == ["undecided", *["fine"] * 9]
    assert verdicts([shown(0.0005), *[shown(1.0, 0.001)] * 9]) == ["slower", *["fine"] * 9]
    assert verdicts([shown(0.0024), shown(0.0049)]) == ["slower", "slower"]  # Holm: the second is alone
    assert verdicts([]) == []


@pytest.mark.parametrize("cases", [1, 12, 40])
def test_the_clearest_evidence_is_enough_for_any_number_of_cases(cases: int) -> None:
    found, _ = compare(lambda: [0.3] * SESSION_PAIRS, cases=cases)
    assert found.pairs == LOOKS[0]
    assert verdicts([found, *[shown(1.0)] * (cases - 1)])[0] == "slower"


def test_the_canary_hears_both_sides() -> None:
    assert can_tell([0.01, -0.01] * 8)
    assert not can_tell([0.1, 0.12] * 8)
    assert not can_tell([-0.1, -0.12] * 8)


def test_one_verdict_for_all() -> None:
    assert overall(["fine", "undecided", "slower"]) == "slower"
    assert overall(["fine", "undecided"]) == "undecided"
    assert overall([]) == overall(["fine"]) == "fine"
