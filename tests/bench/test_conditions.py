"""`bench conditions`, small."""

import math

import pytest

from halfstep.bench.conditions import WAYS, bench_conditions


@pytest.mark.slow
def test_every_way_is_trained_and_looked_at() -> None:
    result = bench_conditions(steps=36, walks=4, frames=16)
    assert result["ways"].keys() == WAYS.keys()
    assert all(math.isfinite(value) for facts in result["ways"].values() for value in facts.values())
    published, both = result["ways"]["as published"], result["ways"]["velocity, both"]
    assert abs(published["action"]) < 0.01  # nothing is heard yet
    assert both["loss"] < 2
