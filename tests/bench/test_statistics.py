"""The simulation that `analyze` is measured by: sets that are alike where they must be, and counts that are right."""

import numpy as np
import pytest

from halfstep.bench import statistics
from halfstep.bench.statistics import Change, Design, bench_statistics, simulated


def test_sets_are_their_number_and_groups_share_their_seeds() -> None:
    runs, groups = simulated(Design((3, 3), paired=True), Change(), 5)
    again, _ = simulated(Design((3, 3), paired=True), Change(), 5)
    other, _ = simulated(Design((3, 3), paired=True), Change(), 6)
    assert list(groups.values()) == ["group 0"] * 3 + ["group 1"] * 3
    for key, run in runs.items():
        assert np.array_equal(run.latents[-1], again[key].latents[-1])
        assert not np.array_equal(run.latents[-1], other[key].latents[-1])
    for k in range(3):
        assert runs[f"0-{k}"].seed == runs[f"1-{k}"].seed
        assert np.array_equal(runs[f"0-{k}"].latents[0], runs[f"1-{k}"].latents[0])
        assert not np.array_equal(runs[f"0-{k}"].latents[-1], runs[f"1-{k}"].latents[-1])
    unpaired, _ = simulated(Design((3, 3), paired=False), Change(), 5)
    assert len({run.seed for run in unpaired.values()}) == 6


def test_what_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """A change that nobody can miss is found in every set; of no change, no more is found than there are sets."""
    monkeypatch.setattr(statistics, "DESIGNS", {"two": Design((12, 12), True), "three": Design((6, 6, 6), True)})
    monkeypatch.setattr(statistics, "CHANGES", {"none": Change(), "far": Change(distance=3.0)})
    designs = bench_statistics(sets=3)["designs"]
    for name in ("two", "three"):
        far, none = designs[name]["far"], designs[name]["none"]
        assert far["sets_with_a_finding"] == far["found"]["path_length"] == far["below_alpha"]["path_length"] == 1
        assert none["sets_with_a_finding"] < 1
        assert set(none["below_alpha"]) >= {"path_length", "dispersion", "dispersion_on_axes"}
    assert designs["three"]["far"]["found"]["a pair of groups"] == 1
