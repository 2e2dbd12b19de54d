"""What a run measures of itself."""

from __future__ import annotations

import pytest

from halfstep.engine import meter
from halfstep.engine.meter import Meter


class Clock:
    now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    found = Clock()
    monkeypatch.setattr(meter, "time", found)
    return found


def test_the_pace_leaves_out_pauses_and_the_rate_does_not(clock: Clock) -> None:
    found = Meter()
    assert found.pace() == 0
    for _ in range(3):
        for _ in range(11):
            found.came_out(1)
            clock.now += 0.05
        clock.now += 60
    assert found.pace() == pytest.approx(20)
    assert found.rate() == 0  # nothing in the last ten seconds
    found.came_out(1)
    assert found.rate() == pytest.approx(0.1) and found.pace() == pytest.approx(20)


def test_what_is_forgotten_does_not_count(clock: Clock) -> None:
    found = Meter()
    found.took("predict", 1.0)
    found.add("frames")
    found.forget()
    assert found.latency() == {} and found.total("frames") == 1
    found.took("predict", 0.5)
    assert found.latency() == {"predict": {"p50": 500.0, "p99": 500.0}}
